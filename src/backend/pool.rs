//! Backends of one node for one database and user.
//!
//! Idle backends are lent last in, first out, so that a quiet pool shrinks. Those who wait are served
//! first in, first out. Connections are opened by tasks of their own, never by a waiter: a waiter that
//! gives up does not take a half-made connection with it, and whatever becomes free first, an old
//! backend or a new one, goes to who has waited longest.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, oneshot};

use super::clean;
use super::defaults::{self, Basis, LoginDefaults, LoginValues, RefusedValues};
use super::login::{self, LoginError, LoginTarget};
use super::places::{Next, Place, Places};
use super::{Backend, CancelTarget, Dirt, StartupParameters};
use crate::config::Config;
use crate::config::live::LiveConfig;
use crate::gate::{Gate, Socket};
use crate::metrics::{Metrics, WaitFor};
use crate::net::NodeTls;
use crate::node::{LoginSettings, NodeFailure, RESULT_SETTINGS};
use crate::positions::Positions;
use crate::scram::LoginKeys;
use crate::topology::{NodeId, Standing, TopologyHandle};
use crate::wire;

/// What all pools share.
pub struct PoolContext {
    /// The configuration.
    pub config: Arc<LiveConfig>,
    /// TLS towards nodes.
    pub tls: ArcSwap<NodeTls>,
    /// The ways to the nodes.
    pub ways: Ways,
    /// Where a fresh backend's counter comes from.
    pub positions: Arc<Positions>,
    /// Where its epoch comes from.
    pub topology: Arc<TopologyHandle>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// What logins give.
    pub login_settings: Arc<LoginSettings>,
    /// Which connections are to be there.
    pub gate: Arc<Gate>,
    /// Per node: statements that sessions have sent and not seen the end of.
    pub outstanding: Box<[AtomicU32]>,
    /// Room for connections, by node.
    pub room: Room,
}

/// What all pools together may have of each node.
pub struct Room {
    nodes: Box<[Arc<Places<Pool>>]>,
    /// A pool that waits for a place may be helped.
    help: Arc<Notify>,
}

impl Room {
    /// On so many nodes, as the configuration has it.
    pub fn new(nodes: usize, config: &Config) -> Room {
        let help = Arc::new(Notify::new());
        let room = Room { nodes: (0..nodes).map(|_| Places::new(help.clone())).collect(), help };
        room.follow(config);
        room
    }

    fn follow(&self, config: &Config) {
        self.nodes.iter().for_each(|places| places.bound(config.pool.max_backends_per_node));
    }
}

/// Per node, which way there is the present one: a number that rises when a reload changes the way (another
/// address, other TLS), and is odd while there is none (the node was removed). A backend that was opened by another
/// serves no further unit. Sessions read one atomic for it where they are lent a backend, and give it back.
pub struct Ways(Box<[AtomicU64]>);

impl Ways {
    /// To so many nodes.
    pub fn new(places: usize) -> Ways {
        Ways((0..places).map(|_| AtomicU64::new(0)).collect())
    }

    fn of(&self, node: NodeId) -> u64 {
        self.0[node.index()].load(Ordering::Acquire)
    }

    fn is_open_to(&self, backend: &Backend) -> bool {
        backend.way & 1 == 0 && backend.way == self.of(backend.node)
    }

    /// From now on another way leads to `node`, or none.
    pub fn change(&self, node: NodeId, removed: bool) {
        let way = &self.0[node.index()];
        // The next number of that parity; there is one writer.
        let now = way.load(Ordering::Relaxed);
        way.store(now + if (now & 1 == 1) == removed { 2 } else { 1 }, Ordering::Release);
    }
}

impl PoolContext {
    /// Delivers an announced cancel request. Resolves when the node has ended its connection.
    pub async fn cancel(&self, target: &CancelTarget) -> std::io::Result<()> {
        let left = || std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
        let socket = self.gate.socket(target.node).ok_or_else(left)?;
        let (config, tls) = (self.config.load_full(), self.tls.load_full());
        let to = way_to(&config, &tls, target.node);
        tokio::select! {
            biased;
            () = socket.closed() => Err(left()),
            done = login::cancel(&to, target.pid, &target.key) => done,
        }
    }

    /// Has the node cancel what `target` runs, which was announced. Should that not arrive, the backend
    /// serves nobody else.
    pub async fn stop(&self, target: &CancelTarget) {
        let underway = target.underway();
        if self.cancel(target).await.is_ok() {
            underway.arrived();
        }
    }

    /// A connection of its own, in no pool, for a client that has authenticated. Its place in the count of
    /// connections is to be kept beside it.
    pub async fn log_in_apart(
        &self,
        node: NodeId,
        user: &str,
        database: &str,
        parameters: &[(String, String)],
        keys: &LoginKeys,
    ) -> Result<(login::LoggedIn, Socket), AcquireError> {
        let socket = self.gate.socket(node).ok_or(AcquireError::Left)?;
        let (config, tls) = (self.config.load_full(), self.tls.load_full());
        let to = way_to(&config, &tls, node);
        let logged_in = tokio::select! {
            biased;
            () = socket.closed() => return Err(AcquireError::Left),
            done = login::log_in(&to, user, database, parameters, keys) => done.map_err(refusal)?,
        };
        if socket.is_closed() {
            return Err(AcquireError::Left);
        }
        Ok((logged_in, socket))
    }

    /// Whether a login that was made now would give what this one's has.
    fn gives_the_same(&self, backend: &Backend) -> bool {
        backend.login_settings == Some(self.login_settings.generation())
            && !backend.defaults.as_ref().is_some_and(|values| values.is_outdated())
    }

    fn count_closed(&self, node: NodeId, reason: CloseReason) {
        self.metrics.backend_closed(node, reason.label());
    }
}

fn way_to<'a>(config: &'a Config, tls: &'a NodeTls, node: NodeId) -> LoginTarget<'a> {
    let address = &config.nodes[node.index()];
    LoginTarget {
        host: &address.host,
        port: address.port,
        tls,
        connect_timeout: config.pool.connect_timeout,
        tcp_user_timeout: config.failover.tcp_user_timeout,
    }
}

/// Why a backend was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// It was found closed (or talking) while idle.
    Dead,
    /// It made room for one with other startup parameters.
    Replaced,
    /// It could not be cleaned.
    Unclean,
    /// The epoch in which it was opened has ended.
    Epoch,
    /// `pool.server_lifetime`.
    Lifetime,
    /// `pool.server_idle_timeout`.
    IdleTimeout,
    /// Its session ended, or its connection broke, in the middle of something.
    Broken,
    /// It stood in the way of a CREATE, ALTER or DROP DATABASE.
    DatabaseCommand,
    /// ALTER ROLE or DATABASE .. SET has changed what a login gives.
    LoginSettings,
    /// Its node is drained (`DRAIN`).
    Drained,
    /// Its database is paused (`PAUSE`).
    Paused,
    /// A reload has changed or removed its node, or made its pool smaller.
    Reload,
    /// Its node was full, and it made room for another pool's.
    NodeFull,
}

impl CloseReason {
    /// All labels.
    pub const LABELS: [&'static str; 13] = [
        CloseReason::Dead.label(),
        CloseReason::Replaced.label(),
        CloseReason::Unclean.label(),
        CloseReason::Epoch.label(),
        CloseReason::Lifetime.label(),
        CloseReason::IdleTimeout.label(),
        CloseReason::Broken.label(),
        CloseReason::DatabaseCommand.label(),
        CloseReason::LoginSettings.label(),
        CloseReason::Drained.label(),
        CloseReason::Paused.label(),
        CloseReason::Reload.label(),
        CloseReason::NodeFull.label(),
    ];

    /// One word for a metric label.
    pub const fn label(self) -> &'static str {
        match self {
            CloseReason::Dead => "dead",
            CloseReason::Replaced => "replaced",
            CloseReason::Unclean => "unclean",
            CloseReason::Epoch => "epoch",
            CloseReason::Lifetime => "lifetime",
            CloseReason::IdleTimeout => "idle_timeout",
            CloseReason::Broken => "broken",
            CloseReason::DatabaseCommand => "database_command",
            CloseReason::LoginSettings => "login_settings",
            CloseReason::Drained => "drained",
            CloseReason::Paused => "paused",
            CloseReason::Reload => "reload",
            CloseReason::NodeFull => "node_full",
        }
    }
}

/// Why no backend could be lent.
#[derive(Clone, Debug)]
pub enum AcquireError {
    /// The node refused the login: its own ErrorResponse frame.
    Refused {
        /// The frame, unaltered.
        message: Arc<[u8]>,
        /// Its SQLSTATE.
        sqlstate: [u8; 5],
    },
    /// The node could not be reached, or the connection broke during the login.
    Unreachable {
        /// What kind of failure it was.
        failure: NodeFailure,
        /// How it failed.
        why: Arc<str>,
    },
    /// The proxy cannot log in there: an authentication method or TLS mode that does not fit.
    Unfit(Arc<str>),
    /// The node is being left: there are to be no connections to it now.
    Left,
    /// Nothing became free in time.
    Timeout,
}

enum Grant {
    Backend(Box<Backend>),
    Failed(AcquireError),
}

struct Waiter {
    startup: Arc<StartupParameters>,
    worker: usize,
    /// A connection that it can use is being opened. Of those who wait with the same startup
    /// parameters these come first, and there are at least as many such connections.
    coming: bool,
    since: Instant,
    grant: oneshot::Sender<Grant>,
}

/// Which of the idle backends that fit a session would rather have. Whatever it wishes, it does not wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The one that it used last, if that was just now: it has its settings and statements. After a pause the most
    /// recently used one of its worker does as well, and lets the pool shrink.
    Recent,
    /// The one that it used last, whenever that was and whichever worker's it is: what it asks for may depend on
    /// what its server process has kept of it.
    Own,
    /// The one on which the session of this process id wrote last: what it has drawn from sequences is known there.
    Writer(u32),
}

/// For how long after it was given back [`Wish::Recent`] counts.
const RECENT: Duration = Duration::from_secs(1);

/// A backend that nobody uses, with what the choice among them goes by at hand.
struct Idle {
    /// See [`Backend::last_user`].
    last_user: u64,
    /// See [`Backend::worker`].
    worker: usize,
    /// Whoever gets it need not wait for it to be cleaned.
    clean: bool,
    // Boxed once, when opened: a backend changes hands with every statement.
    backend: Box<Backend>,
}

impl Idle {
    fn new(backend: Box<Backend>) -> Idle {
        Idle {
            last_user: backend.last_user,
            worker: backend.worker,
            clean: backend.dirt == Dirt::Clean,
            backend,
        }
    }
}

/// Who asks for a backend.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// The session, by a number that no other has.
    pub session: u64,
    /// The worker it runs on.
    pub worker: usize,
    /// What it would rather have.
    pub wish: Wish,
    /// When it asks.
    pub now: Instant,
}

/// Which of the idle backends a session gets: the one it wishes for; else the latest of its worker, else the
/// latest; clean ones first.
fn choose(idle: &[Idle], startup: &StartupParameters, asker: Asker) -> Option<usize> {
    let Asker { session, worker, wish, now } = asker;
    let fits = |idle: &Idle| {
        let its = &*idle.backend.startup;
        std::ptr::eq(its, startup) || its == startup
    };
    let wished = match wish {
        Wish::Recent => idle
            .iter()
            .rposition(|b| b.last_user == session && b.worker == worker && fits(b))
            .filter(|at| now.saturating_duration_since(idle[*at].backend.idle_since) < RECENT),
        Wish::Own => idle.iter().rposition(|b| b.last_user == session && fits(b)),
        Wish::Writer(pid) => idle.iter().rposition(|b| b.backend.last_writer == Some(pid) && fits(b)),
    };
    wished
        .or_else(|| idle.iter().rposition(|b| b.worker == worker && b.clean && fits(b)))
        .or_else(|| idle.iter().rposition(|b| b.clean && fits(b)))
        .or_else(|| idle.iter().rposition(fits))
}

#[derive(Default)]
struct State {
    /// In the order in which they were given back.
    idle: Vec<Idle>,
    waiters: VecDeque<Waiter>,
    /// Lent, idle, being cleaned or being opened.
    open: usize,
    /// Of these: being opened.
    opening: usize,
    /// With what each of those is being opened.
    underway: Vec<Arc<StartupParameters>>,
}

impl State {
    /// Whether a connection is being opened with `startup` that nobody counts on any more: who did has been lent one that
    /// came back sooner.
    fn is_one_spare(&self, startup: &StartupParameters) -> bool {
        let underway = self.underway.iter().filter(|other| ***other == *startup).count();
        let counted_on = self.waiters.iter().filter(|w| w.coming && *w.startup == *startup).count();
        underway > counted_on
    }
}

/// Backends of one node for one database and user.
pub struct Pool {
    context: Arc<PoolContext>,
    node: NodeId,
    database: Arc<str>,
    user: Arc<str>,
    /// Connections at most.
    size: AtomicUsize,
    /// An older connection is closed when it becomes idle; in milliseconds.
    lifetime: AtomicU64,
    /// The keys of the latest login: after a change of password the new ones serve.
    keys: Arc<Mutex<LoginKeys>>,
    /// What the primary gives to logins, and the pools that this is one of.
    defaults: Arc<LoginDefaults>,
    siblings: Weak<UserPools>,
    refused_values: RefusedValues,
    state: Mutex<State>,
}

/// How many backends a pool has, and in what state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolCounts {
    /// The node.
    pub node: NodeId,
    /// The database.
    pub database: Arc<str>,
    /// The user.
    pub user: Arc<str>,
    /// Ready to be lent.
    pub idle: usize,
    /// Lent to sessions or being cleaned.
    pub active: usize,
    /// Being opened.
    pub opening: usize,
    /// Sessions waiting.
    pub waiting: usize,
    /// Backends at most.
    pub size: usize,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Lends a backend that was opened with `startup`, if it can one that `wish` asks for. Waits in line for
    /// up to `patience`.
    pub async fn acquire(
        self: &Arc<Pool>,
        startup: &Arc<StartupParameters>,
        asker: Asker,
        patience: Duration,
    ) -> Result<Lease, AcquireError> {
        while let Some(backend) = self.take_idle(startup, asker, |_| true) {
            let mut lease = self.lend(backend);
            if lease.dirt == Dirt::Clean || lease.last_user == asker.session {
                return Ok(lease);
            }
            match clean::clean(&mut lease).await {
                Ok(()) => return Ok(lease),
                Err(clean::Broken) => lease.close(CloseReason::Unclean),
            }
        }
        let begun = Instant::now();
        let (sender, receiver) = oneshot::channel();
        let mut waiting = Waiting { pool: self, receiver };
        {
            let mut state = self.lock();
            state.waiters.push_back(Waiter {
                startup: startup.clone(),
                worker: asker.worker,
                coming: false,
                since: begun,
                grant: sender,
            });
            self.open_more(&mut state);
        }
        let granted = tokio::time::timeout(patience, &mut waiting.receiver).await;
        self.context.metrics.waited(WaitFor::Backend, begun.elapsed());
        match granted {
            Ok(Ok(Grant::Backend(backend))) => Ok(self.lend(backend)),
            Ok(Ok(Grant::Failed(error))) => Err(error),
            // The pool keeps every sender until it grants: a closed channel cannot happen; say timeout.
            Ok(Err(_)) | Err(_) => Err(AcquireError::Timeout),
        }
    }

    /// The same where one is idle that needs no cleaning; no waiting at all.
    pub fn acquire_now(self: &Arc<Pool>, startup: &StartupParameters, asker: Asker) -> Option<Lease> {
        let is_ready = |idle: &Idle| idle.clean || idle.last_user == asker.session;
        self.take_idle(startup, asker, is_ready).map(|backend| self.lend(backend))
    }

    /// The idle backend that suits best, if it is to be had: `suits` must hold for it.
    fn take_idle(
        self: &Arc<Pool>,
        startup: &StartupParameters,
        asker: Asker,
        suits: impl Fn(&Idle) -> bool,
    ) -> Option<Box<Backend>> {
        let epoch = self.context.topology.load().epoch;
        let mut state = self.lock();
        if state.waiters.iter().any(|w| !w.coming) {
            // First come, first served: an idle backend that does not fit may have to make room for
            // one that does.
            return None;
        }
        loop {
            let at = choose(&state.idle, startup, asker)?;
            if !suits(&state.idle[at]) {
                return None;
            }
            let mut backend = state.idle.remove(at).backend;
            let valid = self.context.gives_the_same(&backend);
            if backend.socket.is_closed() {
                state.open -= 1;
                self.context.count_closed(self.node, CloseReason::Epoch);
                continue;
            }
            let open = self.context.ways.is_open_to(&backend);
            if valid && open && backend.epoch == epoch && backend.is_alive() {
                return Some(backend);
            }
            state.open -= 1;
            let reason = match (valid, open) {
                (_, false) => CloseReason::Reload,
                (true, true) => CloseReason::Dead,
                (false, true) => CloseReason::LoginSettings,
            };
            self.context.count_closed(self.node, reason);
        }
    }

    fn lend(self: &Arc<Pool>, backend: Box<Backend>) -> Lease {
        Lease { pool: self.clone(), backend: Some(backend) }
    }

    fn places(&self) -> &Arc<Places<Pool>> {
        &self.context.room.nodes[self.node.index()]
    }

    /// Opens connections for those who wait, as far as the pool's size allows and its node has room. A full pool
    /// gives up an idle backend whose startup parameters nobody who waits can use.
    fn open_more(self: &Arc<Pool>, state: &mut State) {
        self.open_with(state, None);
    }

    /// The same, with a place on the node for one of them.
    fn open_with(self: &Arc<Pool>, state: &mut State, mut given: Option<Place>) {
        let size = self.size.load(Ordering::Relaxed);
        while let Some(next) = state.waiters.iter().position(|w| !w.coming && !w.grant.is_closed()) {
            if !state.underway.is_empty() && state.is_one_spare(&state.waiters[next].startup) {
                state.waiters[next].coming = true;
                continue;
            }
            if state.open >= size {
                let Some(place) = self.replace(state) else { return };
                given = given.or(place);
            }
            // An idle backend of our own is as good as a place of another's.
            let place = given.take().or_else(|| self.places().take()).or_else(|| self.replace(state)?);
            let Some(place) = place else {
                if self.places().line_up(self) {
                    self.context.metrics.node_full(self.node);
                }
                return;
            };
            let waiter = &mut state.waiters[next];
            waiter.coming = true;
            let (startup, worker) = (waiter.startup.clone(), waiter.worker);
            state.open += 1;
            state.opening += 1;
            state.underway.push(startup.clone());
            let pool = self.clone();
            tokio::spawn(async move { pool.open(startup, worker, place).await });
        }
    }

    /// Closes an idle backend for one with other startup parameters; its place. `None`: there is none.
    ///
    /// None of them fits anybody who waits, else it would have been lent; perhaps one fits who has just come, but must
    /// not overtake.
    fn replace(&self, state: &mut State) -> Option<Option<Place>> {
        if state.idle.is_empty() {
            return None;
        }
        let mut idle = state.idle.remove(0);
        state.open -= 1;
        self.context.count_closed(self.node, CloseReason::Replaced);
        Some(idle.backend.place.take())
    }

    async fn open(self: Arc<Pool>, startup: Arc<StartupParameters>, worker: usize, place: Place) {
        let result = self.connect(&startup, worker).await;
        let mut state = self.lock();
        state.opening -= 1;
        if let Some(at) = state.underway.iter().position(|other| **other == *startup) {
            state.underway.swap_remove(at);
        }
        match result {
            Ok(mut backend) => {
                backend.place = Some(place);
                self.hand_on(&mut state, backend);
            }
            Err(error) => {
                state.open -= 1;
                drop(place);
                // The last in line of those who counted on it.
                let counted_on = state.waiters.iter().filter(|w| w.coming && w.startup == startup).count();
                let underway = state.underway.iter().filter(|other| **other == startup).count();
                if counted_on > underway
                    && let Some(waiter) = state.waiters.iter_mut().rfind(|w| w.coming && w.startup == startup)
                {
                    waiter.coming = false;
                }
                // The node's answer concerns everybody who waits for a connection made like this one;
                // those who wait for a lent backend to come back keep waiting.
                let others = state.open > state.idle.len() + state.opening;
                match &error {
                    // The server is full, but some of its backends are ours and will come back; and
                    // `reap` tries again.
                    AcquireError::Refused { sqlstate, .. } if sqlstate == b"53300" && others => {}
                    // Each try fails one who waits, so this ends.
                    AcquireError::Unreachable { .. } | AcquireError::Timeout if others => {
                        fail_first(&mut state, &error);
                        self.open_more(&mut state);
                    }
                    _ => while fail_first(&mut state, &error) {},
                }
            }
        }
    }

    async fn connect(
        &self,
        startup: &Arc<StartupParameters>,
        worker: usize,
    ) -> Result<Box<Backend>, AcquireError> {
        // Before the addresses are read: a change meanwhile counts as one after it.
        let way = self.context.ways.of(self.node);
        let keys = self.keys.lock().unwrap_or_else(|p| p.into_inner()).clone();
        let (epoch, primary) = {
            let topology = self.context.topology.load();
            (topology.epoch, topology.primary)
        };
        // Before the login: a change meanwhile counts as one after it.
        let settings = &self.context.login_settings;
        let generation = settings.generation();
        let max_lag = self.context.config.load().consistency.max_lag;
        let valid = primary == Some(self.node) || !settings.changed_within(max_lag);
        let basis = Basis { epoch, generation };
        let defaults = match primary {
            Some(primary) if primary == self.node => None,
            primary => Some(self.primary_gives(primary, startup, basis, worker).await),
        };
        let (logged_in, socket) = self.log_in(startup, defaults.as_ref(), &keys).await?;
        let cancel = Arc::new(CancelTarget::new(self.node, logged_in.pid, logged_in.key.clone()));
        self.context.metrics.backend_opened(self.node);
        let mut backend = Box::new(Backend::new(
            self.node,
            logged_in,
            startup.clone(),
            cancel,
            self.context.positions.node(self.node).counter(),
            epoch,
            worker,
            self.birth(),
            socket,
        ));
        backend.way = way;
        backend.login_settings = valid.then_some(generation);
        match defaults {
            None => self.learn_defaults(&mut backend, basis).await?,
            Some(values) => {
                // Of before the last change, or of an earlier primary: for whoever waits for it, and nobody after.
                let of_now = !values.are_known() || self.defaults.asked_on(startup, basis).is_some();
                backend.login_settings = backend.login_settings.filter(|_| of_now);
                backend.defaults = Some(values);
            }
        }
        Ok(backend)
    }

    /// Logs in as a session that asks for `startup` is to be served: on a replica with what the primary would give.
    async fn log_in(
        &self,
        startup: &StartupParameters,
        defaults: Option<&Arc<LoginValues>>,
        keys: &LoginKeys,
    ) -> Result<(login::LoggedIn, Socket), AcquireError> {
        let mut parameters = super::exempt(startup);
        if let Some(values) = defaults {
            if self.refused_values.holds(values, Instant::now()) {
                return Err(AcquireError::Unfit(
                    "it has just refused what the primary gives to logins".into(),
                ));
            }
            values.add_to(&mut parameters);
        }
        let done = self.context.log_in_apart(self.node, &self.user, &self.database, &parameters, keys).await;
        if let (Err(AcquireError::Refused { message, sqlstate }), Some(values)) = (&done, defaults)
            && self.refused_values.note(values, *sqlstate, Instant::now())
        {
            let fields = wire::error_fields(message.get(wire::HEADER..).unwrap_or_default());
            tracing::warn!(
                node = self.context.config.load().nodes[self.node.index()].name,
                database = &*self.database,
                user = &*self.user,
                cause = &*String::from_utf8_lossy(fields.message),
                "a replica refuses a setting that the primary's configuration gives: reads of these logins go elsewhere"
            );
        }
        done
    }

    /// What the primary gives to a login like this, as of `basis`; while it cannot be asked, as it was known last.
    async fn primary_gives(
        &self,
        primary: Option<NodeId>,
        startup: &Arc<StartupParameters>,
        basis: Basis,
        worker: usize,
    ) -> Arc<LoginValues> {
        if let Some(values) = self.defaults.asked_on(startup, basis) {
            return values;
        }
        let answers = |node: &NodeId| {
            self.context.topology.load().node(*node).standing == (Standing::Primary { reachable: true })
        };
        if let (Some(primary), Some(siblings)) = (primary.filter(answers), self.siblings.upgrade()) {
            let asker = Asker { session: 0, worker, wish: Wish::Recent, now: Instant::now() };
            let pool = siblings.node(primary);
            let lease = if self.defaults.may_wait(asker.now) {
                // Whoever opens one there asks.
                let acquired = pool.acquire(startup, asker, defaults::PATIENCE).await;
                if let Err(AcquireError::Timeout) = &acquired {
                    self.defaults.waited_in_vain(Instant::now());
                }
                acquired.ok()
            } else {
                pool.acquire_now(startup, asker)
            };
            // Dropped, it is closed.
            if let Some(mut lease) = lease
                && self.learn_defaults(&mut lease, basis).await.is_ok()
            {
                lease.give_back();
            }
        }
        self.defaults.last_known(startup)
    }

    /// Asks a backend of the primary, opened on this basis or a later one, what its login gave, if nobody has yet.
    async fn learn_defaults(&self, backend: &mut Backend, basis: Basis) -> Result<(), AcquireError> {
        if self.defaults.asked_on(&backend.startup, basis).is_some() {
            return Ok(());
        }
        let ask = async {
            if !backend.applied.entries().is_empty() {
                backend.dirt = backend.dirt.max(Dirt::State);
            }
            clean::clean(backend).await?;
            clean::read_settings(backend, &RESULT_SETTINGS.map(str::to_owned)).await
        };
        let patience = self.context.config.load().pool.connect_timeout;
        let unreachable = |failure, why: &str| AcquireError::Unreachable { failure, why: why.into() };
        match tokio::time::timeout(patience, ask).await {
            Ok(Ok(said)) => self.defaults.learn(&backend.startup, basis, said),
            Ok(Err(clean::Broken)) => {
                return Err(unreachable(NodeFailure::Broken, "it did not say what a login gives"));
            }
            Err(_) => {
                return Err(unreachable(NodeFailure::Timeout, "it did not say in time what a login gives"));
            }
        }
        Ok(())
    }

    /// When a connection that is made now counts as opened: up to a tenth of `server_lifetime` earlier, so
    /// that those which a burst has opened do not all end in one moment.
    fn birth(&self) -> Instant {
        let now = Instant::now();
        now.checked_sub(head_start(self.lifetime(), rand::random())).unwrap_or(now)
    }

    fn lifetime(&self) -> Duration {
        Duration::from_millis(self.lifetime.load(Ordering::Relaxed))
    }

    /// Takes over what the configuration says of it now.
    fn follow(&self, config: &Config) {
        self.size.store(config.pool.size_of(&self.database, &self.user), Ordering::Relaxed);
        let lifetime = u64::try_from(config.pool.server_lifetime.as_millis()).unwrap_or(u64::MAX);
        self.lifetime.store(lifetime, Ordering::Relaxed);
    }

    /// Gives a clean backend to who has waited longest of those whom it fits, or keeps it.
    fn hand_on(self: &Arc<Pool>, state: &mut State, mut backend: Box<Backend>) {
        state.waiters.retain(|waiter| !waiter.grant.is_closed());
        while let Some(at) = self.next_in_line(state, &backend) {
            let Some(waiter) = state.waiters.remove(at) else { break };
            match waiter.grant.send(Grant::Backend(backend)) {
                Ok(()) => return,
                Err(Grant::Backend(back)) => backend = back,
                Err(Grant::Failed(_)) => return,
            }
        }
        if state.opening < state.waiters.len() {
            // Somebody waits for whom no connection is underway, and this one does not fit: make room.
            state.open -= 1;
            self.context.count_closed(self.node, CloseReason::Replaced);
            let place = backend.place.take();
            self.open_with(state, place);
            return;
        }
        state.idle.push(Idle::new(backend));
        self.places().offer();
        // Who waits could not use it; with the pool full, it makes room.
        self.open_more(state);
    }

    /// Who is to have this backend: the first in line; if it does not fit them and a connection that
    /// does is underway, the first whom it fits. Else nobody, or those in front would be overtaken for ever.
    fn next_in_line(&self, state: &State, backend: &Backend) -> Option<usize> {
        let fits = |waiter: &Waiter| *waiter.startup == *backend.startup;
        match state.waiters.front() {
            Some(first) if fits(first) => Some(0),
            Some(_) if state.opening > 0 => state.waiters.iter().position(fits),
            _ => None,
        }
    }

    /// Takes a backend back. It must be idle, with nothing unread.
    fn give_back(self: &Arc<Pool>, backend: Box<Backend>) {
        if backend.dirt <= Dirt::Hidden && !backend.cancel.was_sent() {
            return self.keep(backend);
        }
        self.clean(backend);
    }

    /// Cleans a backend before anybody gets it.
    fn clean(self: &Arc<Pool>, mut backend: Box<Backend>) {
        let pool = self.clone();
        tokio::spawn(async move {
            match clean::clean(&mut backend).await {
                Ok(()) => pool.keep(backend),
                Err(clean::Broken) => pool.closed(CloseReason::Unclean),
            }
        });
    }

    fn keep(self: &Arc<Pool>, mut backend: Box<Backend>) {
        let now = Instant::now();
        let epoch = self.context.topology.load().epoch;
        if backend.epoch != epoch || backend.socket.is_closed() {
            drop(backend);
            return self.closed(CloseReason::Epoch);
        }
        if now.duration_since(backend.opened) > self.lifetime() {
            return self.closed(CloseReason::Lifetime);
        }
        if !self.context.gives_the_same(&backend) {
            return self.closed(CloseReason::LoginSettings);
        }
        if !self.context.ways.is_open_to(&backend) {
            return self.closed(CloseReason::Reload);
        }
        if self.gives_way() {
            return self.closed(CloseReason::NodeFull);
        }
        backend.idle_since = now;
        let mut state = self.lock();
        if state.open > self.size.load(Ordering::Relaxed) {
            drop(state);
            return self.closed(CloseReason::Reload);
        }
        if backend.dirt != Dirt::Clean && !state.waiters.is_empty() {
            // It is not for who waits as it is.
            drop(state);
            return self.clean(backend);
        }
        // Nobody overtakes a head for whom nothing is on its way: it gets this one's place.
        let passed_over = state.waiters.front().is_some_and(|w| !w.coming && *w.startup != *backend.startup);
        if passed_over {
            drop(state);
            return self.closed(CloseReason::Replaced);
        }
        self.hand_on(&mut state, backend);
    }

    /// Whether a backend that was given back is to be closed, for another pool or because there are too many on the
    /// node. A pool gives way when it needs none, when it has two more than the other, and in turn when that has none:
    /// so pools come to share the node evenly and then keep what they have, and none waits for ever.
    fn gives_way(self: &Arc<Pool>) -> bool {
        let places = self.places();
        if places.is_over() {
            return true;
        }
        if !places.is_wanted() {
            return false;
        }
        // One after the other: two pools may look at each other.
        let need = |pool: &Pool| {
            let state = pool.lock();
            let first = state.waiters.iter().find(|w| !w.coming && !w.grant.is_closed());
            (state.open, first.map(|waiter| waiter.since))
        };
        let (own_open, own_since) = need(self);
        // Not only the first in line: it may need less than those behind it, or nothing any more.
        let others = places.in_line().into_iter().filter(|other| !Arc::ptr_eq(other, self));
        others.map(|other| need(&other)).any(|(open, since)| match (own_since, since) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(own), Some(other)) => own_open > open + 1 || (open == 0 && other < own),
        })
    }

    /// A place on the node has been found for it.
    fn open_at(self: &Arc<Pool>, place: Place) {
        let mut state = self.lock();
        self.open_with(&mut state, Some(place));
    }

    /// Since when its longest unused backend is idle.
    fn oldest_idle(&self) -> Option<Instant> {
        self.lock().idle.first().map(|idle| idle.backend.idle_since)
    }

    /// Closes its longest unused backend, for another pool.
    fn make_room(&self) {
        let mut state = self.lock();
        if !state.idle.is_empty() {
            drop(state.idle.remove(0));
            state.open -= 1;
            self.context.count_closed(self.node, CloseReason::NodeFull);
        }
    }

    /// A backend of this pool is gone.
    fn closed(self: &Arc<Pool>, reason: CloseReason) {
        self.context.count_closed(self.node, reason);
        let mut state = self.lock();
        state.open -= 1;
        self.open_more(&mut state);
    }

    fn close_idle(self: &Arc<Pool>, reason: CloseReason) {
        let mut state = self.lock();
        for idle in std::mem::take(&mut state.idle) {
            state.open -= 1;
            self.context.count_closed(idle.backend.node, reason);
        }
        self.open_more(&mut state);
    }

    /// Closes idle backends whose connections were told to close.
    fn close_left(self: &Arc<Pool>) {
        let mut state = self.lock();
        let before = state.idle.len();
        state.idle.retain(|idle| !idle.backend.socket.is_closed());
        let closed = before - state.idle.len();
        (0..closed).for_each(|_| self.context.count_closed(self.node, CloseReason::Epoch));
        state.open -= closed;
        self.open_more(&mut state);
    }

    /// Closes idle backends that are too old, unused for too long, dead or of an earlier epoch.
    fn reap(self: &Arc<Pool>, now: Instant) {
        let idle_timeout = self.context.config.load().pool.server_idle_timeout;
        let (lifetime, size) = (self.lifetime(), self.size.load(Ordering::Relaxed));
        let epoch = self.context.topology.load().epoch;
        let drained = self.context.topology.is_drained(self.node);
        let mut state = self.lock();
        let before = state.idle.len();
        let mut too_many = state.open.saturating_sub(size);
        state.idle.retain_mut(|Idle { backend: b, .. }| {
            let reason = if !self.context.ways.is_open_to(b) {
                CloseReason::Reload
            } else if b.epoch != epoch || b.socket.is_closed() {
                CloseReason::Epoch
            } else if drained {
                CloseReason::Drained
            } else if now.duration_since(b.idle_since) > idle_timeout {
                CloseReason::IdleTimeout
            } else if now.duration_since(b.opened) > lifetime {
                CloseReason::Lifetime
            } else if !self.context.gives_the_same(b) {
                CloseReason::LoginSettings
            } else if !b.is_alive() {
                CloseReason::Dead
            } else if too_many > 0 {
                CloseReason::Reload
            } else {
                return true;
            };
            too_many = too_many.saturating_sub(1);
            self.context.count_closed(b.node, reason);
            false
        });
        state.open -= before - state.idle.len();
        self.open_more(&mut state);
    }

    fn counts(&self) -> PoolCounts {
        let state = self.lock();
        PoolCounts {
            node: self.node,
            database: self.database.clone(),
            user: self.user.clone(),
            idle: state.idle.len(),
            active: state.open - state.idle.len() - state.opening,
            opening: state.opening,
            waiting: state.waiters.iter().filter(|w| !w.grant.is_closed()).count(),
            size: self.size.load(Ordering::Relaxed),
        }
    }
}

/// Drops who has given up from the line, and a backend that was granted meanwhile back into the pool.
struct Waiting<'a> {
    pool: &'a Arc<Pool>,
    receiver: oneshot::Receiver<Grant>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        if let Ok(Grant::Backend(backend)) = self.receiver.try_recv() {
            self.pool.give_back(backend);
        } else {
            // Sessions that gave up must not lengthen the line, nor be counted by open_more.
            self.pool.lock().waiters.retain(|w| !w.grant.is_closed());
        }
    }
}

/// By how much sooner than `lifetime` one connection of many ends; `chance`: any number.
fn head_start(lifetime: Duration, chance: u32) -> Duration {
    lifetime.mul_f64(f64::from(chance) / f64::from(u32::MAX) / 10.0)
}

fn fail_first(state: &mut State, error: &AcquireError) -> bool {
    while let Some(waiter) = state.waiters.pop_front() {
        if waiter.grant.send(Grant::Failed(error.clone())).is_ok() {
            return true;
        }
    }
    false
}

fn refusal(error: LoginError) -> AcquireError {
    let why: Arc<str> = error.to_string().into();
    let unreachable = |failure| AcquireError::Unreachable { failure, why: why.clone() };
    match error {
        LoginError::Refused { message, sqlstate, .. } => {
            AcquireError::Refused { message: message.into(), sqlstate }
        }
        LoginError::Io { cause, .. } if cause.kind() == std::io::ErrorKind::ConnectionRefused => {
            unreachable(NodeFailure::Refused)
        }
        LoginError::Io { .. } | LoginError::Protocol { .. } => unreachable(NodeFailure::Broken),
        LoginError::Timeout { .. } => unreachable(NodeFailure::Timeout),
        LoginError::StaleKeys { .. }
        | LoginError::Unsupported { .. }
        | LoginError::UnsendableStartup
        | LoginError::Scram { .. }
        | LoginError::Tls { .. } => AcquireError::Unfit(why),
    }
}

/// A backend lent to a session. Dropping it closes the backend: only [`give_back`](Lease::give_back)
/// says that it is idle and whole.
pub struct Lease {
    pool: Arc<Pool>,
    backend: Option<Box<Backend>>,
}

impl Lease {
    /// Closes a backend that is in the middle of something which nobody wants any more, and has the node
    /// stop it. The pool gets its place back when the node has been told.
    pub fn abandon(self) {
        let target = self.cancel.clone();
        target.announce();
        let context = self.pool.context.clone();
        tokio::spawn(async move {
            // Should it not arrive, the node finds out when it answers.
            context.stop(&target).await;
            drop(self);
        });
    }

    /// Closes it, for this reason.
    fn close(mut self, reason: CloseReason) {
        if self.backend.take().is_some() {
            self.pool.closed(reason);
        }
    }

    /// Whether its node is still where it was when this was opened: else samples of the node say nothing of it. Ask
    /// after the sample was looked at: a node is sampled at another address only once its way has changed.
    pub fn is_current(&self) -> bool {
        self.pool.context.ways.is_open_to(self)
    }

    /// Gives an idle backend back to its pool, which cleans it first where it must. One whose server has said something
    /// since, unasked (as a rule its last word: it crashes, or stops), is closed.
    pub fn give_back(mut self) {
        if !self.input.is_empty() {
            return self.close(CloseReason::Dead);
        }
        if let Some(backend) = self.backend.take() {
            debug_assert!(backend.output.is_empty(), "a whole backend");
            self.pool.give_back(backend);
        }
    }
}

impl std::ops::Deref for Lease {
    type Target = Backend;
    fn deref(&self) -> &Backend {
        self.backend.as_ref().expect("a lease holds its backend until it is given back")
    }
}

impl std::ops::DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Backend {
        self.backend.as_mut().expect("a lease holds its backend until it is given back")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.backend.take().is_some() {
            self.pool.closed(CloseReason::Broken);
        }
    }
}

/// The pools of one database and user, one per node.
pub struct UserPools {
    context: Arc<PoolContext>,
    database: Arc<str>,
    user: Arc<str>,
    keys: Arc<Mutex<LoginKeys>>,
    /// What the primary gives to logins.
    defaults: Arc<LoginDefaults>,
    itself: Weak<UserPools>,
    /// By node; made when first used.
    nodes: Box<[OnceLock<Arc<Pool>>]>,
    /// What a server reports at login, by startup parameters, and under which settings of logins.
    welcomes: Mutex<HashMap<Arc<StartupParameters>, (u64, Welcome)>>,
    /// The latest of [`UserPools::with_application_name`].
    named: Mutex<Option<Named>>,
    /// A session has asked for what it drew from sequences (`currval`, `lastval`).
    pub asks_sequences: AtomicBool,
}

/// What a server reported, and the same with an application's name.
struct Named {
    of: Arc<super::Parameters>,
    application: Box<str>,
    parameters: Arc<super::Parameters>,
}

/// What a login is told, and what holds for its session.
#[derive(Clone)]
pub struct Welcome {
    /// What the server reported.
    pub parameters: Arc<super::Parameters>,
    /// The server's `idle_session_timeout` for this role and database; zero: none.
    pub idle_session_timeout: Duration,
    /// Its `default_transaction_isolation`; empty if nobody needs to know.
    pub isolation: Arc<[u8]>,
}

/// Startup parameter sets whose reports are remembered per database and user.
const MAX_WELCOMES: usize = 64;

impl UserPools {
    /// The latest login's keys serve from now on.
    pub fn set_keys(&self, keys: &LoginKeys) {
        *self.keys.lock().unwrap_or_else(|p| p.into_inner()) = keys.clone();
    }

    /// The pool of one node.
    pub fn node(&self, node: NodeId) -> &Arc<Pool> {
        self.nodes[node.index()].get_or_init(|| {
            let pool = Pool {
                context: self.context.clone(),
                node,
                database: self.database.clone(),
                user: self.user.clone(),
                size: AtomicUsize::new(0),
                lifetime: AtomicU64::new(0),
                keys: self.keys.clone(),
                defaults: self.defaults.clone(),
                siblings: self.itself.clone(),
                refused_values: RefusedValues::default(),
                state: Mutex::new(State::default()),
            };
            pool.follow(&self.context.config.load());
            Arc::new(pool)
        })
    }

    fn made(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.nodes.iter().filter_map(OnceLock::get)
    }

    /// What a server reported to an earlier login with these startup parameters, and they themselves: sessions that
    /// ask for the same hold one copy.
    pub fn welcome(&self, startup: &StartupParameters) -> Option<(Arc<StartupParameters>, Welcome)> {
        let generation = self.context.login_settings.generation();
        let welcomes = self.welcomes.lock().unwrap_or_else(|p| p.into_inner());
        let (startup, (valid, told)) = welcomes.get_key_value(startup)?;
        (*valid == generation).then(|| (startup.clone(), told.clone()))
    }

    /// The parameters with an application's name. Most connections of an application have one name, and so they hold
    /// one copy.
    pub fn with_application_name(&self, of: &Arc<super::Parameters>, name: &str) -> Arc<super::Parameters> {
        let mut named = self.named.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(named) = &*named
            && Arc::ptr_eq(&named.of, of)
            && &*named.application == name
        {
            return named.parameters.clone();
        }
        let mut parameters = super::Parameters::clone(of);
        parameters.insert(b"application_name", name.as_bytes());
        let parameters = Arc::new(parameters);
        *named = Some(Named { of: of.clone(), application: name.into(), parameters: parameters.clone() });
        parameters
    }

    /// Remembers what a server reported to a login, if that is still what it would report.
    pub fn remember_welcome(&self, backend: &Backend, welcome: &Welcome) {
        let Some(generation) = backend.login_settings else { return };
        let mut welcomes = self.welcomes.lock().unwrap_or_else(|p| p.into_inner());
        if welcomes.len() >= MAX_WELCOMES {
            welcomes.clear();
        }
        welcomes.insert(backend.startup.clone(), (generation, welcome.clone()));
    }
}

type ByDatabaseAndUser = HashMap<(Arc<str>, Arc<str>), Arc<UserPools>>;

/// All pools.
pub struct Pools {
    /// What they share.
    pub context: Arc<PoolContext>,
    users: Mutex<ByDatabaseAndUser>,
}

impl Pools {
    /// No backend is opened yet.
    pub fn new(context: Arc<PoolContext>) -> Pools {
        Pools { context, users: Mutex::new(HashMap::new()) }
    }

    /// The pools of one database and user. Only authenticated users come here.
    pub fn of(&self, database: &str, user: &str, keys: &LoginKeys) -> Arc<UserPools> {
        let mut users = self.users.lock().unwrap_or_else(|p| p.into_inner());
        let key = (Arc::from(database), Arc::from(user));
        if let Some(pools) = users.get(&key) {
            let pools = pools.clone();
            drop(users);
            pools.set_keys(keys);
            return pools;
        }
        let pools = Arc::new_cyclic(|itself| UserPools {
            context: self.context.clone(),
            database: key.0.clone(),
            user: key.1.clone(),
            keys: Arc::new(Mutex::new(keys.clone())),
            defaults: Arc::default(),
            itself: itself.clone(),
            nodes: (0..self.context.ways.0.len()).map(|_| OnceLock::new()).collect(),
            welcomes: Mutex::new(HashMap::new()),
            named: Mutex::new(None),
            asks_sequences: AtomicBool::new(false),
        });
        users.insert(key, pools.clone());
        pools
    }

    /// Closes the idle backends of all databases but `except`.
    pub fn close_idle(&self, except: &str) {
        for user in self.all() {
            for pool in user.made().filter(|pool| *pool.database != *except) {
                pool.close_idle(CloseReason::DatabaseCommand);
            }
        }
    }

    /// Closes the idle backends of a database, or of all, because it is paused.
    pub fn close_paused(&self, database: Option<&str>) {
        for user in self.all() {
            for pool in user.made().filter(|pool| database.is_none_or(|name| *pool.database == *name)) {
                pool.close_idle(CloseReason::Paused);
            }
        }
    }

    /// Follows another configuration that is in force now: sizes, lifetimes, and what is too much of idle backends.
    /// Logins to come are told anew what they find.
    pub fn follow(&self, config: &Config) {
        let now = Instant::now();
        self.context.room.follow(config);
        for user in self.all() {
            user.welcomes.lock().unwrap_or_else(|p| p.into_inner()).clear();
            for pool in user.made() {
                pool.follow(config);
                pool.reap(now);
            }
        }
    }

    /// Closes what nobody uses of the connections that are told to close, for ever.
    pub async fn close_left(&self) {
        let mut seen = 0;
        loop {
            self.context.gate.closing(&mut seen).await;
            for user in self.all() {
                user.made().for_each(Pool::close_left);
            }
        }
    }

    /// Sees to the pools that wait for a place on their node, for ever.
    pub async fn help(&self) {
        loop {
            self.context.room.help.notified().await;
            (0u16..).map(NodeId).zip(&self.context.room.nodes).for_each(|(node, places)| {
                while places.is_wanted() {
                    match places.next() {
                        Next::Placed(pool, place) => pool.open_at(place),
                        // When there is nothing to spare, what is given back next may be.
                        Next::Full if self.make_room(node) => {}
                        Next::Full | Next::Nobody => break,
                    }
                }
            });
        }
    }

    /// Closes the longest unused backend of a node, whose ever it is. `false`: all are in use.
    fn make_room(&self, node: NodeId) -> bool {
        let users = self.all();
        let pools = users.iter().filter_map(|user| user.nodes[node.index()].get());
        let oldest =
            pools.filter_map(|pool| Some((pool.oldest_idle()?, pool))).min_by_key(|(since, _)| *since);
        // Should it be lent just now, there is another round, with one idle backend less.
        oldest.inspect(|(_, pool)| pool.make_room()).is_some()
    }

    /// Every pool's counts, for metrics.
    pub fn counts(&self) -> Vec<PoolCounts> {
        self.all().iter().flat_map(|u| u.made().map(|p| p.counts()).collect::<Vec<_>>()).collect()
    }

    fn all(&self) -> Vec<Arc<UserPools>> {
        self.users.lock().unwrap_or_else(|p| p.into_inner()).values().cloned().collect()
    }

    /// Closes idle backends that have had their time, once a second, for ever; and forgets users
    /// whose pools have become empty and that no session holds.
    pub async fn reap(&self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            tick.tick().await;
            let now = Instant::now();
            for user in self.all() {
                for pool in user.made() {
                    pool.reap(now);
                }
            }
            let mut users = self.users.lock().unwrap_or_else(|p| p.into_inner());
            users.retain(|_, pools| Arc::strong_count(pools) > 1 || pools.made().any(|p| p.lock().open > 0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_end_within_the_last_tenth_of_their_lifetime() {
        let hour = Duration::from_secs(3600);
        assert_eq!(head_start(hour, 0), Duration::ZERO);
        assert_eq!(head_start(hour, u32::MAX), hour / 10);
        assert!((hour / 21..hour / 19).contains(&head_start(hour, u32::MAX / 2)));
    }
}
