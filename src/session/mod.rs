//! One client's conversation, message by message: the place where client, route and backend meet.
//!
//! A session waits for a unit of messages, decides where it may run (`demand`, `place`), borrows a
//! backend, lets the bytes flow (`exchange`) and gives the backend back when nothing of the session's
//! is left on it. What it promises: a unit runs on one backend; a statement not shown to be a read
//! runs on the primary; no read runs on a node behind the session's mark; a unit is run a second time
//! only if it was a read and nothing of its first answer has left.

mod answers;
mod clock;
mod demand;
mod durability;
mod exchange;
pub mod facts;
mod gate;
pub mod handle;
pub mod ledger;
mod loss;
pub mod mark;
mod messages;
pub mod own;
pub mod pause;
pub mod pins;
mod place;
pub mod prepared;
pub mod promise;
pub mod replication;
mod sequences;
pub mod settings;
pub mod shared_mark;
mod slow;
pub mod timeouts;
mod transaction;
mod translate;
mod welcome;

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, BytesMut};

use self::demand::Demand;
use self::durability::Durable;
use self::exchange::{Again, HIGH_WATER, Outcome, Purpose, Unit, put_report};
use self::facts::{Identity, Kind, Wait};
pub use self::gate::GATE_REFUSED_LABELS;
use self::handle::{Ending, SessionHandle, Sessions};
use self::ledger::{Ledger, Seen};
pub use self::loss::ENDED_LABELS;
use self::loss::Listening;
use self::mark::{Freshness, Mark, Quorum, Survival};
use self::pause::Pauses;
use self::pins::{Done, Next, PinSet, Pins};
use self::place::Placed;
use self::prepared::{Names, SqlCommand, Statement, Statements};
use self::promise::{OwnState, PrimaryReads, take_own};
use self::settings::{AtReady, Settings};
use self::shared_mark::{GlobalMark, NamedMarks, SharedMark};
use self::timeouts::{Overdue, Timeouts};
use self::transaction::{Lazy, Splits};
pub use self::translate::UNNAMED_LABELS;
use crate::backend::pool::{Lease, Pools, UserPools};
use crate::backend::{Backend, Dirt, Parameters, StartupParameters, clean, poll_drain, poll_fill};
use crate::catalogs::{Catalogs, DatabaseCatalog};
use crate::classify::setting::{self, Change};
use crate::classify::{self, Classifier, Leaves, Lexing, PinReason};
use crate::config::live::LiveConfig;
use crate::config::{Config, LostWrite, PoolMode};
use crate::consistency::{Level, Promise};
use crate::gate::{Gate, Presence};
use crate::log;
use crate::metrics::Metrics;
use crate::net::Stream;
use crate::node::{NodeFailure, Nodes};
use crate::positions::{Incarnation, Positions};
use crate::route::{ClassLabel, RouteReason};
use crate::topology::{Epoch, NodeId, TopologyHandle};
use crate::wire::{self, ErrorReport, HEADER, TransactionStatus};

/// Why units are run again, as the metric labels it.
pub const REDONE_LABELS: [&str; 7] = Again::LABELS;

/// What all sessions share.
pub struct Shared {
    /// The configuration that is in force; a session goes by the one that it took over last (`Session::follow`).
    pub config: Arc<LiveConfig>,
    /// What is believed of the nodes.
    pub topology: Arc<TopologyHandle>,
    /// What is known of their positions.
    pub positions: Arc<Positions>,
    /// Judges statements.
    pub classifier: Arc<Classifier>,
    /// The databases' catalog facts.
    pub catalogs: Arc<Catalogs>,
    /// The control user's connections.
    pub nodes: Arc<Nodes>,
    /// Connections in reserve are being closed for a database command.
    pub making_room: AtomicBool,
    /// Backends.
    pub pools: Arc<Pools>,
    /// Before the primary.
    pub gate: Arc<Gate>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// All sessions.
    pub sessions: Arc<Sessions>,
    /// Makes prepared statements' names.
    pub names: Names,
    /// What has run, by skeleton.
    pub ledger: Ledger,
    /// Whose statements are held.
    pub pauses: Pauses,
    /// Where failures of nodes are reported.
    pub reports: crate::control::Reports,
    /// The mark of level `global`.
    pub global_mark: GlobalMark,
    /// The named sessions.
    pub named_marks: Mutex<NamedMarks>,
    /// How many reads went to the primary because no replica was fresh enough, of how many.
    pub primary_reads: PrimaryReads,
    /// Bounds log lines about single statements.
    pub lines: log::Rate,
}

impl Shared {
    /// A CREATE, ALTER or DROP DATABASE is about to run: PostgreSQL refuses it while anybody is connected
    /// to that database, and waits five seconds for them to go. Whatever we hold only in reserve for
    /// other databases is let go of for as long, so that sessions which have just ended count, too.
    fn make_room_for_database_command(self: &Arc<Shared>, own_database: &str) {
        self.let_go_of_databases(own_database);
        if self.making_room.swap(true, Ordering::SeqCst) {
            return;
        }
        let (shared, own_database) = (self.clone(), own_database.to_owned());
        tokio::spawn(async move {
            for _ in 0..50 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                shared.let_go_of_databases(&own_database);
            }
            shared.making_room.store(false, Ordering::SeqCst);
        });
    }

    fn let_go_of_databases(&self, except: &str) {
        self.pools.close_idle(except);
        self.catalogs.release_unused(except);
        self.nodes.close_databases(except);
    }
}

/// What a logged-in client brings along.
pub struct Arrival {
    /// Its connection; AuthenticationOk has been sent.
    pub stream: Stream,
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
    /// Startup parameters that its backends must share.
    pub startup: StartupParameters,
    /// Protocol 3.minor.
    pub minor: u16,
    /// What logs in to the nodes in its place.
    pub keys: crate::scram::LoginKeys,
    /// It came by the read-only port: replicas serve it, and nobody else.
    pub read_only: bool,
    /// Its address.
    pub peer: Option<std::net::SocketAddr>,
    /// Where the primary was when it began to log in, if that was noted.
    pub mark: Option<Box<Mark>>,
}

/// The mark of a session whose client begins to log in: what it may have written through another connection it has
/// written before. The primary is asked at once where reads may leave it, so that the answer comes while the client proves
/// who it is: its first read then waits for nothing.
pub(crate) fn first_mark(shared: &Shared, user: &str, database: &str) -> Mark {
    let mark = Mark::new(&*shared.positions, &shared.topology.load());
    let config = shared.config.load();
    let level = config.consistency.promise_for(user, database).level;
    if level != Level::Eventual
        && config.routing.for_session(user, database).0
        && let Some(primary) = mark.awaits()
    {
        shared.positions.node(primary).want();
    }
    mark
}

impl Arrival {
    /// Who is at the other end.
    pub(crate) fn identity(&self, kind: Kind) -> Identity {
        Identity {
            user: self.user.as_str().into(),
            database: self.database.as_str().into(),
            peer: self.peer,
            kind,
        }
    }
}

/// The role that the leased backend's node has for this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Primary,
    /// A replica that serves reads in the primary's place: what is not a read leaves it.
    Replica,
    /// A replica, for a session of the read-only port: all stays there, refusals included.
    Standby,
}

/// The client's side of a session.
struct ClientEnd {
    stream: Stream,
    input: BytesMut,
    output: BytesMut,
    /// It has sent its last byte.
    at_end: bool,
    /// Bytes that it has sent, and been sent.
    received: u64,
    sent: u64,
    /// How long a read may still take after that.
    patience: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
}

impl ClientEnd {
    /// Reads what it has sent.
    fn poll_fill(&mut self, cx: &mut std::task::Context<'_>) -> Poll<std::io::Result<usize>> {
        let read = poll_fill(&mut self.stream, &mut self.input, cx);
        if let Poll::Ready(Ok(n)) = read {
            self.received += n as u64;
        }
        read
    }

    /// Whether all that it has sent is answered, and the answers are on their way.
    fn is_answered(&self) -> bool {
        self.input.is_empty() && self.output.is_empty()
    }

    /// Writes what it is to be sent, as far as it takes it.
    fn poll_drain(&mut self, cx: &mut std::task::Context<'_>) -> Poll<std::io::Result<()>> {
        let before = self.output.len();
        let wrote = poll_drain(&mut self.stream, &mut self.output, cx);
        self.sent += (before - self.output.len()) as u64;
        wrote
    }
}

/// What a running unit is entered in the ledger under.
enum Entered {
    /// Nothing.
    No,
    /// A Query's skeleton; a place was kept when its text was at hand.
    Query(u64),
    /// A prepared statement.
    Prepared(Arc<Statement>),
}

/// How a session ends.
#[derive(Debug)]
pub(crate) enum End {
    /// The client said goodbye, or is gone.
    ClientGone,
    /// We end it, and say why.
    Fatal(Box<ErrorReport>),
    /// The node has told the client itself.
    NodeSaidFatal,
    /// The connection to a node broke in the middle of a unit, or under a session that holds it.
    NodeLost { node: NodeId },
    /// Between two units session state was lost with a backend.
    StateLost { node: NodeId },
}

impl End {
    fn fatal(report: ErrorReport) -> End {
        End::Fatal(Box::new(report))
    }

    fn protocol(message: impl Into<String>) -> End {
        End::fatal(ErrorReport::fatal("08P01", message))
    }

    fn length(error: wire::InvalidLength) -> End {
        End::protocol(error.to_string())
    }

    fn shutdown() -> End {
        End::fatal(ErrorReport::fatal("57P01", "terminating connection due to administrator command"))
    }
}

/// Takes a session out of the registry, however it ends.
pub(crate) struct Registered {
    sessions: Arc<Sessions>,
    pid: u32,
}

impl Registered {
    /// The session with this process id has been registered.
    pub(crate) fn new(sessions: Arc<Sessions>, pid: u32) -> Registered {
        Registered { sessions, pid }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.sessions.unregister(self.pid);
    }
}

/// A unit that runs on a node, as balancing sees it.
struct Outstanding<'a>(&'a std::sync::atomic::AtomicU32);

impl<'a> Outstanding<'a> {
    fn on(counter: &'a std::sync::atomic::AtomicU32) -> Outstanding<'a> {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Outstanding(counter)
    }
}

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// How long a session that is told to end waits for the node to be told.
const STOPPING: Duration = Duration::from_secs(1);

/// One client's session.
pub struct Session {
    shared: Arc<Shared>,
    /// What it goes by, until the unit that runs is over.
    config: Arc<Config>,
    worker: usize,
    handle: Arc<SessionHandle>,
    client: ClientEnd,
    pools: Arc<UserPools>,
    startup: Arc<StartupParameters>,
    /// What it has set.
    settings: Settings,
    /// What the portals of this transaction do to settings.
    portals: Vec<(Vec<u8>, Vec<Change>)>,
    /// The parameters as the client was told them at its login.
    told_at_login: Arc<Parameters>,
    database: Arc<str>,
    catalog: Arc<DatabaseCatalog>,
    /// The parameters as the client was told them last.
    reported: Arc<Parameters>,
    lexing: Lexing,
    /// It came by the read-only port.
    read_only: bool,
    /// `pool.mode: session`: it keeps the first backend it gets.
    keeps_backend: bool,
    timeouts: Timeouts,
    status: TransactionStatus,
    /// Which of its transactions begin without a backend.
    splits: Splits,
    /// Its transaction, while no node knows of that.
    lazy: Option<Lazy>,
    mark: Mark,
    /// What it is promised.
    promise: Promise,
    /// What the running unit is promised: the same, or what comments in its statements ask for.
    asked_for: Promise,
    /// A statement of the running unit has been asked for its hints.
    hinted: bool,
    /// Its reads may run on replicas.
    split: bool,
    /// What its own settings say of that.
    own: OwnState,
    /// The mark that it shares with others, of which `mark` is its copy.
    shared_mark: Option<Arc<SharedMark>>,
    /// Changes of the primary up to here are being told to one who shares it; 0: it has heard of them.
    tells: Epoch,
    /// At level `strong`: what the running statement must be shown.
    freshness: Option<Freshness>,
    /// The same, where replicas answer for the primary.
    quorum: Option<Box<Quorum>>,
    lease: Option<Lease>,
    /// Whether it is on the primary, as the gate counts.
    presence: Presence,
    /// The channels it listens to.
    listening: Listening,
    /// How durable its commits must be; `None`: nothing is said of that.
    durable: Option<Box<Durable>>,
    /// Its transaction may have written.
    wrote: bool,
    /// A statement of its transaction, which a node knows of, has run: it has its snapshot.
    queried: bool,
    role: Role,
    /// The sampler connection of the replica that `lease` is on when the session was let there.
    incarnation: Incarnation,
    pins: Pins,
    /// Since when notifications may be waiting that the session has not heard.
    deaf_since: Option<Instant>,
    /// While it listens: when the unit began that made it do so.
    listens_since: Option<Instant>,
    /// In this transaction data definition ran: the catalog facts are read again when it ends.
    ddl: bool,
    /// In this transaction ALTER ROLE or DATABASE ran, which may change what logins give.
    login_settings: bool,
    statements: Statements,
    /// Its number for its backends, which no other session has: what code has left hidden on the one it used last
    /// is its own. Another one when that is to be forgotten.
    affinity: u64,
    /// The unit calls `currval` or `lastval`.
    asks_sequences: bool,
    /// It runs code that is not understood, which may keep something in its server process.
    asks_process: bool,
    /// It asks for the time; none: nobody has looked.
    asks_for_time: Option<bool>,
    /// A comment in it has a value that is none: the error that is to be its answer.
    bad_hint: Option<Box<ErrorReport>>,
    /// The unit is a Query that is about one name.
    sql: Option<SqlCommand>,
    /// What the unit's first Parse made when it was judged: the same when it is sent, once.
    judged: Option<Arc<Statement>>,
    /// The unit is to run again because a shared statement was out of date.
    prepare_anew: bool,
    unit: Unit,
    /// An error of ours was sent in place of a unit: all up to Sync is dropped.
    skipping: bool,
    /// Bytes of a client's message still to be dropped.
    drop_rest: usize,
    /// Length of the client's output before the unit's answer.
    output_before: usize,
    started: Instant,
    /// The running unit's first statement.
    entered: Entered,
    /// The running unit's text, where slow statements are logged.
    kept: Option<Box<slow::Kept>>,
    /// A failover has lost something of the session's; its next statement says so, once.
    lost: Option<mark::Fork>,
}

/// What of its login a session still has to see to.
struct Beginning {
    application_name: Option<Arc<str>>,
    /// One of Highwater's own settings has no such value.
    invalid: Option<ErrorReport>,
}

impl Session {
    /// Serves a client from its login to its end.
    pub async fn run(shared: Arc<Shared>, arrival: Box<Arrival>, worker: usize) {
        // 3.2 allows long keys; 3.0 has four bytes.
        let kind = if arrival.read_only { Kind::ReadOnly } else { Kind::Client };
        let handle =
            shared.sessions.register(if arrival.minor >= 2 { 32 } else { 4 }, arrival.identity(kind));
        let _registered = Registered { sessions: shared.sessions.clone(), pid: handle.pid };
        // What is needed at the beginning and at the end alone takes no room in between: most sessions wait.
        let (mut session, beginning) = Session::new(&shared, *arrival, worker, handle);
        let end = match Box::pin(session.begin(beginning)).await {
            Ok(()) => session.serve().await,
            Err(end) => end,
        };
        Box::pin(session.close(end)).await;
    }

    fn new(
        shared: &Arc<Shared>,
        mut arrival: Arrival,
        worker: usize,
        handle: Arc<SessionHandle>,
    ) -> (Box<Session>, Beginning) {
        let application_name = arrival.startup.take_application_name();
        let own = take_own(&mut arrival.startup);
        let config = shared.config.load_full();
        let mode = config.pool.mode_of(&arrival.database, &arrival.user);
        let pools = shared.pools.of(&arrival.database, &arrival.user, &arrival.keys);
        let topology = shared.topology.load();
        let mut promise = config.consistency.promise_for(&arrival.user, &arrival.database);
        let split;
        (split, promise.route) = config.routing.for_session(&arrival.user, &arrival.database);
        let (base, tables) = config.durability.for_session(&arrival.user, &arrival.database);
        let durable = Durable::new(base, tables);
        let (at_login, invalid) = match own {
            Ok(own) => (own, None),
            Err(report) => (Vec::new(), Some(report)),
        };
        let own_state = OwnState::new(Arc::from(arrival.user.as_str()), promise, at_login);
        let mut session = Box::new(Session {
            worker,
            client: ClientEnd {
                stream: arrival.stream,
                input: BytesMut::new(),
                output: BytesMut::new(),
                at_end: false,
                received: 0,
                sent: 0,
                patience: None,
            },
            pools,
            startup: Arc::new(arrival.startup),
            settings: Settings::new(application_name.as_deref()),
            portals: Vec::new(),
            told_at_login: Arc::default(),
            catalog: shared.catalogs.database(&arrival.database),
            database: handle.facts.identity.database.clone(),
            handle,
            reported: Arc::default(),
            lexing: Lexing::Unsafe,
            read_only: arrival.read_only,
            // On a replica there is nothing to keep: the session's backends are alike, and lost with it.
            keeps_backend: mode == PoolMode::Session && !arrival.read_only,
            timeouts: Timeouts::new(config.timeouts),
            status: TransactionStatus::Idle,
            splits: Splits::None,
            lazy: None,
            // Of an earlier epoch it would tell of a loss that is none of the session's.
            mark: arrival
                .mark
                .filter(|mark| mark.epoch() == topology.epoch)
                .map_or_else(|| Mark::new(&*shared.positions, &topology), |mark| *mark),
            promise: own_state.promise(),
            asked_for: own_state.promise(),
            hinted: false,
            split,
            own: own_state,
            shared_mark: None,
            tells: Epoch(0),
            freshness: None,
            quorum: None,
            lease: None,
            presence: shared.gate.presence(worker),
            listening: Listening::default(),
            durable,
            wrote: false,
            queried: false,
            role: Role::Primary,
            incarnation: Incarnation::default(),
            pins: Pins::default(),
            deaf_since: None,
            listens_since: None,
            ddl: false,
            login_settings: false,
            statements: Statements::new(shared.names.number()),
            affinity: shared.names.number(),
            asks_sequences: false,
            asks_process: false,
            asks_for_time: None,
            bad_hint: None,
            sql: None,
            judged: None,
            prepare_anew: false,
            unit: Unit::none(),
            skipping: false,
            drop_rest: 0,
            output_before: 0,
            started: Instant::now(),
            entered: Entered::No,
            kept: None,
            lost: None,
            shared: shared.clone(),
            config,
        });
        session.share_mark();
        (session, Beginning { application_name, invalid })
    }

    async fn begin(&mut self, beginning: Beginning) -> Result<(), End> {
        if let Some(mut report) = beginning.invalid {
            report.severity = wire::Severity::Fatal;
            return Err(End::fatal(report));
        }
        if let Some(name) = &beginning.application_name {
            self.handle.facts.call_application(name.as_bytes());
        }
        self.take_startup_settings().await?;
        self.welcome(beginning.application_name.as_deref()).await?;
        // Longer than most answers: its buffer is not kept for them.
        self.flush_client().await?;
        self.client.output = BytesMut::new();
        self.show_rest();
        Ok(())
    }

    /// Shows what the session is between two units.
    fn show_rest(&self) {
        let facts = &self.handle.facts;
        facts.moved(self.client.received, self.client.sent);
        facts.marks(self.mark.position(), self.mark.awaits());
        facts.rests(self.status, self.lease.as_ref().map(|lease| lease.node));
    }

    /// ParameterStatus, BackendKeyData, ReadyForQuery. What a server reports comes from a real login
    /// with the same startup parameters, which also lets the node refuse the client in its own words.
    async fn welcome(&mut self, application_name: Option<&str>) -> Result<(), End> {
        let welcome = match self.pools.welcome(&self.startup) {
            Some((startup, welcome)) => {
                self.startup = startup;
                welcome
            }
            // Seldom, and large: not part of every session.
            None => Box::pin(self.find_welcome()).await?,
        };
        self.timeouts.also_idle_session(welcome.idle_session_timeout);
        self.splits = self.splits_transactions(&welcome.isolation);
        let mut parameters = welcome.parameters;
        if let Some(name) = application_name {
            parameters = self.pools.with_application_name(&parameters, name);
        }
        let mut out = Vec::with_capacity(512);
        for (name, value) in parameters.iter() {
            let value = if name == b"in_hot_standby" && !self.read_only { b"off" } else { value };
            wire::put(&mut out, b'S', |out| {
                wire::put_cstr(out, name);
                wire::put_cstr(out, value);
            });
        }
        wire::put(&mut out, b'K', |out| {
            out.extend_from_slice(&self.handle.pid.to_be_bytes());
            out.extend_from_slice(&self.handle.key);
        });
        wire::put(&mut out, b'Z', |out| out.push(TransactionStatus::Idle.byte()));
        self.client.output.put_slice(&out);
        self.told_at_login = parameters.clone();
        self.reported = parameters;
        self.lexing_changed();
        Ok(())
    }

    /// The client was told a parameter that decides how its texts are to be read.
    fn lexing_changed(&mut self) {
        let value = |name: &[u8]| self.reported.get(name);
        let standard_strings = value(b"standard_conforming_strings") == Some(b"on");
        let utf8 = |encoding: Option<&[u8]>| encoding == Some(b"UTF8");
        self.lexing = match value(b"client_encoding") {
            _ if !standard_strings => Lexing::Unsafe,
            client if utf8(client) && utf8(value(b"server_encoding")) => Lexing::Utf8,
            Some(b"SJIS" | b"BIG5" | b"GBK" | b"UHC" | b"GB18030" | b"JOHAB" | b"SHIFT_JIS_2004") | None => {
                Lexing::Unsafe
            }
            Some(_) => Lexing::AsciiNames,
        };
    }

    /// Takes over the configuration that is in force: what the session is promised, where its reads run, and when it
    /// is ended. Not within a transaction, which keeps what it began with.
    #[cold]
    fn follow(&mut self) {
        if self.status != TransactionStatus::Idle {
            return;
        }
        self.handle.takes_over();
        let Some(config) = self.shared.config.changed_from(&self.config) else { return };
        let mut promise = config.consistency.promise_for(self.own.user(), &self.database);
        (self.split, promise.route) = config.routing.for_session(self.own.user(), &self.database);
        if config.timeouts != self.config.timeouts {
            self.timeouts.follow(config.timeouts);
        }
        self.config = config;
        self.own.rebase(promise);
        self.follow_own();
    }

    async fn serve(&mut self) -> End {
        loop {
            let served = match self.await_message().await {
                Ok(()) => self.message().await,
                Err(end) => Err(end),
            };
            if let Err(end) = served.or_else(|end| self.survive(end)) {
                return end;
            }
        }
    }

    /// Waits until the client has sent the header of a message; meanwhile passes on what a held
    /// backend says by itself.
    async fn next_message(&mut self) -> Result<(), End> {
        poll_fn(|cx| match self.poll_message(cx) {
            Poll::Pending => self.timeouts.poll_waiting(self.status, cx).map(|what| {
                self.shared.metrics.timeouts.inc(what.label());
                Err(End::fatal(what.report()))
            }),
            ready => ready,
        })
        .await
    }

    fn poll_message(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), End>> {
        loop {
            if self.drop_rest > 0 {
                let n = self.drop_rest.min(self.client.input.len());
                self.client.input.advance(n);
                self.drop_rest -= n;
            }
            if self.drop_rest == 0 {
                match wire::header(&self.client.input) {
                    Ok(Some(_)) => return Poll::Ready(Ok(())),
                    Ok(None) => {}
                    Err(error) => return Poll::Ready(Err(End::length(error))),
                }
            }
            match self.handle.poll_ending(cx) {
                Ending::Now => return Poll::Ready(Err(End::shutdown())),
                Ending::WhenIdle if self.status == TransactionStatus::Idle => {
                    return Poll::Ready(Err(End::shutdown()));
                }
                Ending::No | Ending::WhenIdle => {}
            }
            if self.handle.is_reloaded() {
                self.follow();
            }
            self.hear_backend(cx)?;
            let not_all_heard = self.client.output.len() >= HIGH_WATER;
            if !self.client.output.is_empty()
                && let Poll::Ready(Err(_)) = self.client.poll_drain(cx)
            {
                return Poll::Ready(Err(End::ClientGone));
            }
            if self.client.output.len() >= HIGH_WATER {
                // It asks (or listens) and does not read.
                return Poll::Pending;
            }
            if not_all_heard {
                // There is room again, and nobody but us would ask the backend for more.
                continue;
            }
            if self.client.at_end {
                // It said nothing more; what it is owed is still written.
                if self.client.output.is_empty() {
                    return Poll::Ready(Err(End::ClientGone));
                }
                return Poll::Pending;
            }
            self.shrink();
            let is_answered = self.tells != Epoch(0) && self.drop_rest == 0 && self.client.is_answered();
            match self.client.poll_fill(cx) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    if is_answered {
                        self.has_heard();
                    }
                }
                Poll::Ready(Ok(_)) if !self.client.output.is_empty() => self.client.at_end = true,
                Poll::Ready(_) => return Poll::Ready(Err(End::ClientGone)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Gives buffers back that a large message or result has grown: the session may now idle for long.
    fn shrink(&mut self) {
        const KEEP: usize = 4 * 1024;
        for buffer in [&mut self.client.input, &mut self.client.output] {
            if buffer.is_empty() && buffer.capacity() > KEEP {
                *buffer = BytesMut::new();
            }
        }
    }

    /// What a held backend says while nothing runs: notifications, parameters, its end. As much of it as
    /// the client keeps up with.
    fn hear_backend(&mut self, cx: &mut std::task::Context<'_>) -> Result<(), End> {
        if let Some(node) = self.is_left() {
            return Err(End::NodeLost { node });
        }
        let Some(mut lease) = self.lease.take() else { return Ok(()) };
        let heard = self.hear(&mut lease, cx);
        self.lease = Some(lease);
        heard
    }

    fn hear(&mut self, backend: &mut Backend, cx: &mut std::task::Context<'_>) -> Result<(), End> {
        let node = backend.node;
        let lost = || End::NodeLost { node };
        while self.client.output.len() < HIGH_WATER {
            match wire::header(&backend.input).map_err(|_| lost())? {
                Some(header) if header.len <= backend.input.len() => self.heard(backend, header)?,
                _ => match poll_fill(&mut backend.stream, &mut backend.input, cx) {
                    Poll::Ready(Ok(n)) if n > 0 => {}
                    Poll::Ready(_) => return Err(lost()),
                    Poll::Pending => {
                        if self.status == TransactionStatus::Idle {
                            self.deaf_since = None;
                        }
                        return Ok(());
                    }
                },
            }
        }
        self.deaf_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn heard(&mut self, backend: &mut Backend, header: wire::Header) -> Result<(), End> {
        match header.tag {
            b'A' => {
                let message = backend.input.split_to(header.len);
                self.notification(backend, message);
            }
            b'S' => {
                let message = backend.input.split_to(header.len);
                backend.report(&message[HEADER..]);
                self.tell_parameter(&message[HEADER..]);
            }
            // It is going away, and all that the session has there can be had elsewhere.
            b'E' if self.outlives_backend() => return Err(End::NodeLost { node: backend.node }),
            b'N' if self.outlives_backend()
                && wire::error_fields(&backend.input[HEADER..header.len]).routine == b"quickdie" =>
            {
                return Err(End::NodeLost { node: backend.node });
            }
            b'N' | b'E' => {
                self.client.output.put_slice(&backend.input.split_to(header.len));
                if header.tag == b'E' {
                    return Err(End::NodeSaidFatal);
                }
            }
            tag => {
                tracing::error!(node = backend.node.0, tag = %char::from(tag), "an idle node spoke out of turn");
                return Err(End::NodeLost { node: backend.node });
            }
        }
        Ok(())
    }

    /// Deals with the message at the start of the client's input.
    async fn message(&mut self) -> Result<(), End> {
        let Ok(Some(header)) = wire::header(&self.client.input) else { return Ok(()) };
        if self.skipping && header.tag != b'X' {
            return self.skip(header);
        }
        match header.tag {
            b'Q' | b'F' | b'P' | b'B' | b'D' | b'E' | b'C' | b'S' | b'H' => self.unit().await,
            b'X' => Err(End::ClientGone),
            // Left over from a COPY that has failed: the server ignores them, too.
            b'd' | b'c' | b'f' => {
                self.drop_message(header.len);
                Ok(())
            }
            tag => Err(End::protocol(format!("invalid frontend message type {tag}"))),
        }
    }

    /// A message behind an error of ours that took a unit's place: nothing is read of it but where the unit ends. As on
    /// the server, that begins anew with a Sync which has a body, and then fails.
    fn skip(&mut self, header: wire::Header) -> Result<(), End> {
        if messages::is_too_long(header) {
            return Err(End::protocol("invalid message length"));
        }
        self.drop_message(header.len);
        if header.tag == b'S' {
            self.skipping = false;
            if header.len > HEADER {
                let report = ErrorReport::error("08P01", "invalid message format").routine("pq_getmsgend");
                put_report(&mut self.client.output, &report);
            }
            self.put_ready();
        }
        Ok(())
    }

    fn drop_message(&mut self, len: usize) {
        let there = len.min(self.client.input.len());
        self.client.input.advance(there);
        self.drop_rest = len - there;
    }

    fn put_ready(&mut self) {
        self.client.output.put_slice(&[b'Z', 0, 0, 0, 5, self.status.byte()]);
    }

    /// Runs the unit that begins at the start of the client's input.
    async fn unit(&mut self) -> Result<(), End> {
        self.started = Instant::now();
        if self.handle.is_reloaded() {
            self.follow();
        }
        // The server keeps them until the transaction is over.
        match self.lease {
            Some(_) => _ = self.deaf_since.get_or_insert(self.started),
            None => self.deaf_since = Some(self.started),
        }
        self.handle.facts.begins(self.started);
        self.handle.begin();
        self.forget_own();
        // What it was told speaks of notes that were taken before it was asked, and of no later ones.
        self.quorum = None;
        (self.asked_for, self.hinted) = (self.promise, false);
        (self.sql, self.judged) = (None, None);
        (self.asks_sequences, self.asks_process) = (false, false);
        (self.asks_for_time, self.bad_hint) = (None, None);
        self.entered = Entered::No;
        let result = match self.sit_out_pause().await? {
            Some(report) => self.fail_unit(report),
            None if self.lease.is_some() => self.held_unit().await,
            None => self.free_unit().await,
        };
        if self.lease.is_none() {
            self.handle.idle();
            if result.is_ok() {
                self.without_backend();
            }
        }
        if self.lease.is_none() || self.status == TransactionStatus::Idle {
            self.presence.leave();
        }
        self.follow_own();
        self.settle_durability();
        self.unit.rests();
        self.show_rest();
        self.timeouts.unit_ended(self.status);
        if self.timeouts.take_stopped() && result.is_ok() {
            if self.status != TransactionStatus::Idle || self.unit.failed() {
                // It was stopped, or its transaction is still open.
                return Err(self.overdue());
            }
            // Its commit came first, and has happened.
            self.let_cancel_pass().await?;
        }
        result
    }

    /// The backend that the session keeps was sent a cancel that came too late: it must not hit the next
    /// statement, which the client has done nothing to have cancelled.
    async fn let_cancel_pass(&mut self) -> Result<(), End> {
        self.flush_client().await?;
        let Some(lease) = &mut self.lease else { return Ok(()) };
        let node = lease.node;
        clean::fence(lease).await.map_err(|_| End::StateLost { node })?;
        self.hear_what_came();
        Ok(())
    }

    /// The session's transaction has taken too long.
    fn overdue(&self) -> End {
        self.shared.metrics.timeouts.inc(Overdue::Transaction.label());
        End::fatal(Overdue::Transaction.report())
    }

    /// A unit of a session that holds no backend: it is routed, and perhaps run again elsewhere.
    async fn free_unit(&mut self) -> Result<(), End> {
        let mut demand = match self.demand().await? {
            Demand::Ours => return Ok(()),
            // Nowhere else to go: what the replica says of it, the client hears.
            demand if self.read_only => demand.unvetted(),
            demand => demand,
        };
        let mut avoid: Vec<NodeId> = Vec::new();
        loop {
            if self.handle.is_cancelled() {
                return self.fail_unit(canceled());
            }
            let placed = match self.place(&demand, &avoid).await? {
                Ok(placed) => placed,
                Err(report) => return self.fail_unit(report),
            };
            if !self.client.output.is_empty() {
                let left = placed.lease.socket.closed();
                tokio::select! {
                    biased;
                    flushed = self.flush_client() => flushed?,
                    // The client may take its time; whoever waits for the connection to be closed does not.
                    () = left => continue,
                }
            }
            let (node, reason) = (placed.node, placed.reason);
            let told_before = self.reported.clone();
            self.begin_on(placed, &demand);
            if !self.may_be_cancelled() {
                // The cancel came when the backend had just been found.
                self.give_back();
                return self.fail_unit(canceled());
            }
            if !demand.is_read() {
                self.may_notify();
            }
            let pools = self.shared.pools.clone();
            let outstanding = Outstanding::on(&pools.context.outstanding[node.index()]);
            let outcome = self.exchange().await;
            drop(outstanding);
            match outcome {
                Ok(Outcome::Done) => {
                    self.count(node, demand.label(), reason);
                    return self.finish().await;
                }
                Ok(Outcome::Again(again)) => {
                    self.client.output.truncate(self.output_before);
                    self.reported = told_before;
                    self.lexing_changed();
                    self.statements.take_back();
                    if self.take_back(again, node, &mut avoid) {
                        return self.fail_unit(canceled());
                    }
                    if avoid.len() > self.config.nodes.len() + 2 {
                        let report = ErrorReport::error("08006", "the connection to the node broke")
                            .detail("The read was tried on every node.");
                        return self.fail_unit(report);
                    }
                    demand.redo(again);
                }
                Ok(Outcome::Move) => {
                    self.count(node, demand.label(), reason);
                    self.leave_replica();
                    self.asks_for_time = None;
                    self.started = Instant::now();
                    demand = match self.demand().await? {
                        Demand::Ours => return Ok(()),
                        demand => demand,
                    };
                }
                Ok(Outcome::Refused(error)) => {
                    // Closed: what it was left with is not known.
                    self.lease = None;
                    return self.refuse_unit(&error);
                }
                Ok(Outcome::Cancelled) => {
                    self.give_back();
                    return self.fail_unit(canceled());
                }
                Err(end) => return Err(self.ended(end)),
            }
        }
    }

    /// The unit starts on a backend that was found for it.
    fn begin_on(&mut self, placed: Placed, demand: &Demand) {
        // In a transaction nothing runs twice on its one node.
        let opens = self.lazy.is_some() && placed.role == Role::Primary;
        self.unit =
            if opens { Unit::begins(false, 0) } else { Unit::begins(demand.is_read(), demand.vetted()) };
        self.unit.before = self.status;
        self.keep_text();
        self.count_demand(demand);
        self.output_before = self.client.output.len();
        self.role = placed.role;
        self.handle.facts.runs_on(placed.node);
        let mut lease = placed.lease;
        if std::mem::take(&mut self.prepare_anew) {
            self.unit.anew = true;
            for (_, prepared) in lease.prepared.iter_mut() {
                prepared.stale = true;
            }
        }
        if !self.give_settings(&mut lease) {
            self.tell_differences(&lease.parameters);
        }
        self.give_own(&mut lease);
        self.forget_sequences(&mut lease, !demand.is_read());
        if opens || self.listening.is_deaf() {
            let mut unit = std::mem::replace(&mut self.unit, Unit::none());
            self.give_listens(&mut unit, &mut lease);
            if opens {
                self.open_transaction(&mut unit, &mut lease);
            }
            self.unit = unit;
        }
        self.lease = Some(lease);
    }

    /// From now on a cancel goes to the backend, unless a Query of ours is ahead of the unit: that is not what the
    /// client wants to have cancelled, and must not fail before its transaction has begun. `false`: one has come.
    fn may_be_cancelled(&self) -> bool {
        match &self.lease {
            Some(lease) if self.unit.ahead == 0 => self.handle.running(&lease.cancel),
            // What has come, or comes, meets the unit when that Query is answered.
            _ => true,
        }
    }

    /// If the unit shows Highwater's own settings, the backend is given what they are.
    fn give_own(&mut self, backend: &mut Backend) {
        if let Some(sql) = self.own_to_show() {
            self.unit.put_ahead(backend, sql.as_bytes(), Purpose::Own);
        }
    }

    /// Puts what makes the backend's settings the session's ahead of the unit. Whether that was needed.
    fn give_settings(&mut self, backend: &mut Backend) -> bool {
        let durable = if self.durable.is_some() { self.wanted_for_unit() } else { None };
        let wanted = durable.as_ref().unwrap_or_else(|| self.settings.wanted());
        if Arc::ptr_eq(&backend.applied, wanted) || backend.applied == *wanted {
            return false;
        }
        let Some(sql) = settings::replay(&backend.applied, wanted) else {
            backend.applied = wanted.clone();
            return false;
        };
        self.unit.applies = Some(wanted.clone());
        self.shared.metrics.settings_replays.inc();
        self.unit.put_ahead(backend, sql.as_bytes(), Purpose::Settings);
        true
    }

    /// What a portal's execution does to settings.
    fn keep_portal(&mut self, portal: &[u8], changes: Vec<Change>) {
        self.portals.retain(|(name, _)| name != portal);
        if self.portals.len() >= settings::MOST_PENDING {
            self.settings.perhaps(vec![Change::Untracked]);
        } else if !changes.is_empty() {
            self.portals.push((portal.to_vec(), changes));
        }
    }

    fn portal_changes(&self, portal: &[u8]) -> Option<Vec<Change>> {
        self.portals.iter().find(|(name, _)| name == portal).map(|(_, changes)| changes.clone())
    }

    /// A unit begins that is not shown to be all reads.
    fn may_notify(&self) {
        if let Some(lease) = &self.lease {
            self.shared.sessions.senders.begins(&lease.cancel, self.handle.pid, self.started);
        }
    }

    /// What is known of a unit from how it was routed.
    fn count_demand(&mut self, demand: &Demand) {
        self.unit.leave(demand.leaves());
        self.unit.writes = !demand.is_read() && !self.read_only;
        self.unit.ddl = demand.is_ddl();
        self.unit.control = demand.label() == ClassLabel::TransactionControl;
        self.unit.may_commit = demand.may_commit();
        if demand.leaves().pins().has(PinReason::Setting) {
            let header = wire::header(&self.client.input).ok().flatten();
            let body = header.and_then(|header| self.client.input.get(HEADER..header.len));
            self.unit.count_code(demand.leaves(), body.and_then(wire::cstr).map(|(text, _)| text));
        }
        if demand.leaves().pins().has(PinReason::Listen)
            && let Ok(Some(header)) = wire::header(&self.client.input)
            && let Some((text, _)) = self.client.input.get(HEADER..header.len).and_then(wire::cstr)
        {
            self.listening.asked(text);
        }
        if (demand.sets() || demand.is_ddl())
            && let Ok(Some(header)) = wire::header(&self.client.input)
            && let Some(body) = self.client.input.get(HEADER..header.len)
        {
            let text = body.strip_suffix(b"\0").unwrap_or_default();
            self.unit.login_settings = demand.is_ddl() && classify::alters_login(text);
            if demand.sets() {
                let effects = setting::effects(text, self.lexing);
                self.unit.count_settings(&effects);
            }
        }
    }

    /// A unit in a transaction or on a pinned backend: there is nothing to decide.
    async fn held_unit(&mut self) -> Result<(), End> {
        let demand = match self.demand_held() {
            Some(Demand::Ours) => return Ok(()),
            Some(demand) => Some(demand),
            None => None,
        };
        if self.outlives_backend() {
            // A backend that has gone since the client was last waited for gets no statement.
            poll_fn(|cx| Poll::Ready(self.hear_backend(cx))).await?;
        }
        // In a transaction nothing is waited for. What holds the primary's floor may be that very transaction: it could
        // not end before the floor had risen, and others would wait for its locks meanwhile.
        if self.role == Role::Primary && self.status == TransactionStatus::Idle {
            // A pinned session's mark holds for its backend, too.
            let topology = self.shared.topology.load_full();
            self.bring_mark_forward(&topology);
            self.take_shared_mark(&topology);
            self.ask_freshness();
            loop {
                if let Err(report) = self.await_primary().await? {
                    return self.fail_unit(report);
                }
                if self.presence.enter() {
                    break;
                }
            }
        }
        let Some(lease) = &self.lease else { return Ok(()) };
        let node = lease.node;
        if self.role != Role::Replica
            && (lease.epoch != self.shared.topology.load().epoch || lease.socket.is_closed())
        {
            // Whatever it is, it is no more what it was: not one byte of a statement for it.
            return Err(End::NodeLost { node });
        }
        if let Some((text, class)) = self.first_text() {
            if class.hints.durability.is_some() {
                self.hints_durability();
            }
            self.look_for_own(&text, class).await?;
        }
        let reason = if self.pins.hold() { RouteReason::Pinned } else { RouteReason::InTransaction };
        self.unit = Unit::begins(false, 0);
        self.unit.before = self.status;
        self.keep_text();
        if let Some(demand) = &demand {
            self.count_demand(demand);
        }
        self.output_before = self.client.output.len();
        if let Some(mut lease) = self.lease.take() {
            if self.status == TransactionStatus::Idle {
                self.give_settings(&mut lease);
            }
            if self.status != TransactionStatus::Failed {
                self.give_own(&mut lease);
            }
            let mut unit = std::mem::replace(&mut self.unit, Unit::none());
            self.give_durability(&mut unit, &mut lease);
            self.forget_sequences_inside(&mut unit, &mut lease, demand.map(|demand| demand.leaves()));
            self.unit = unit;
            self.lease = Some(lease);
        }
        if !self.may_be_cancelled() {
            if self.status == TransactionStatus::Idle {
                return self.fail_unit(canceled());
            }
            // In a transaction only the backend could fail it; and one server ignores a cancel that
            // finds it idle.
            self.handle.begin();
            let _ = self.may_be_cancelled();
        }
        if !demand.as_ref().is_some_and(Demand::is_read) {
            self.may_notify();
        }
        match self.exchange().await {
            // Nothing moves off a primary; a session held on a replica would try for ever.
            Ok(Outcome::Move | Outcome::Again(_)) => Err(End::NodeLost { node }),
            // What the session has left on it is gone with it.
            Ok(Outcome::Refused(_)) if self.status == TransactionStatus::Idle => Err(End::StateLost { node }),
            // The transaction has failed with it.
            Ok(Outcome::Refused(error)) => self.refuse_unit(&error),
            Ok(Outcome::Cancelled) => self.fail_unit(canceled()),
            Ok(Outcome::Done) => {
                self.count(node, demand.map_or(ClassLabel::Unit, |d| d.label()), reason);
                self.finish().await
            }
            Err(end) => Err(self.ended(end)),
        }
    }

    /// An exchange has not come to its end: if a node was lost, it is noted and said.
    fn ended(&mut self, end: End) -> End {
        if let End::NodeLost { node } = end {
            self.note();
            self.shared.reports.report_failure(node, NodeFailure::Broken);
        }
        end
    }

    /// The leased backend is the session's from now on.
    fn pin_now(&mut self, reason: PinReason) {
        self.pins.add(reason);
        self.show_pins();
    }

    /// Brings metrics and handle up to what the session is pinned by.
    fn show_pins(&mut self) {
        let (before, now) = (self.handle.pins(), self.pins.now());
        if before == now {
            return;
        }
        let metrics = &self.shared.metrics;
        for reason in now.without(before).iter() {
            metrics.pins.inc(reason.label());
            metrics.pinned_by.inc(reason.label());
        }
        for reason in before.without(now).iter() {
            metrics.pinned_by.dec(reason.label());
        }
        match (before.has(PinReason::Listen), now.has(PinReason::Listen)) {
            (false, true) => {
                self.listens_since = Some(self.started);
                self.shared.sessions.senders.listens();
            }
            (true, false) => {
                self.listens_since = None;
                self.shared.sessions.senders.listens_no_more();
            }
            _ => {}
        }
        match (before.is_empty(), now.is_empty()) {
            (true, false) => metrics.pinned_sessions.inc(),
            (false, true) => metrics.pinned_sessions.dec(),
            _ => {}
        }
        self.handle.show_pins(now);
    }

    fn count(&mut self, node: NodeId, class: ClassLabel, reason: RouteReason) {
        let over = Instant::now();
        let took = over.duration_since(self.started);
        let on_replica = self.role != Role::Primary;
        self.shared.metrics.statement(node, class as usize, reason as usize);
        self.shared.metrics.statement_took(node, took);
        self.handle.facts.ran(class, reason, on_replica, over);
        self.look_if_slow(node, class, reason, took);
        match std::mem::replace(&mut self.entered, Entered::No) {
            Entered::No => {}
            Entered::Query(key) => self.shared.ledger.ran(self.worker, key, on_replica, took, None),
            Entered::Prepared(statement) => {
                let Some((key, class)) = statement.entry() else { return };
                let seen =
                    Seen { text: statement.text(), lexing: self.lexing, database: &self.database, class };
                self.shared.ledger.ran(self.worker, key, on_replica, took, Some(seen));
            }
        }
    }

    /// Keeps a place in the ledger for the unit's first statement, a Query.
    fn enter_query(&self, text: &[u8], class: classify::StatementClass, key: classify::ClassKey) -> Entered {
        if !self.shared.ledger.is_kept() {
            return Entered::No;
        }
        let seen = Seen { text, lexing: self.lexing, database: &self.database, class };
        self.shared.ledger.expect(self.worker, key.short_skeleton(), &seen);
        Entered::Query(key.short_skeleton())
    }

    /// The unit's first statement is a prepared one.
    fn enter_statement(&mut self, statement: &Arc<Statement>) {
        if self.shared.ledger.is_kept() && matches!(self.entered, Entered::No) {
            self.entered = Entered::Prepared(statement.clone());
        }
    }

    /// Waits while statements of this database are held (`PAUSE`). `Some`: why the unit does not run.
    async fn sit_out_pause(&mut self) -> Result<Option<ErrorReport>, End> {
        let outside = self.status == TransactionStatus::Idle && self.lazy.is_none();
        if !outside || !self.shared.pauses.holds(&self.database) {
            return Ok(None);
        }
        let begun = Instant::now();
        let patience = self.config.pool.query_wait_timeout;
        self.handle.facts.waits_for(Wait::Paused);
        let shared = self.shared.clone();
        loop {
            let resumed = shared.pauses.resumed();
            if !shared.pauses.holds(&self.database) {
                self.handle.facts.waited(Wait::Paused, begun.elapsed());
                return Ok(None);
            }
            if begun.elapsed() >= patience {
                let report = ErrorReport::error("57P03", "the database is paused")
                    .detail(format!(
                        "Waited {patience:?} (pool.query_wait_timeout) for RESUME on the admin console. The statement was not sent to any node."
                    ));
                return Ok(Some(report));
            }
            if !self.wait(resumed, begun + patience).await? {
                return Ok(Some(canceled()));
            }
        }
    }

    /// The unit ran on a replica that could not serve it: where it must not go again, and what is
    /// learned. Whether the client has cancelled it meanwhile: then it is not run again.
    fn take_back(&mut self, again: Again, node: NodeId, avoid: &mut Vec<NodeId>) -> bool {
        self.shared.metrics.redone.inc(again.label());
        if matches!(again, Again::NotARead | Again::Installation) {
            self.learn();
        }
        self.prepare_anew = again == Again::StaleStatement;
        // From here on a cancel finds the session waiting.
        self.handle.waiting();
        let lease = self.lease.take();
        let cancelled = lease.as_ref().is_some_and(|lease| lease.cancel.was_sent());
        match again {
            Again::NotARead
            | Again::LateReplica
            | Again::Installation
            | Again::Damage
            | Again::Conflict
            | Again::StaleStatement => {
                // Only if its answer has been read to the end is the backend idle again.
                if let Some(lease) = lease
                    && self.unit.is_over()
                    && lease.is_between_units()
                {
                    lease.give_back();
                }
            }
            Again::NodeLost => {
                self.shared.reports.report_failure(node, NodeFailure::Broken);
                avoid.push(node);
            }
        }
        self.unit = Unit::none();
        self.without_backend();
        cancelled
    }

    /// After a unit's answers: notes, pins, and what becomes of the backend.
    async fn finish(&mut self) -> Result<(), End> {
        if self.unit.was_refused()
            && let Some(lease) = self.lease.take()
        {
            // Nothing of it has run; the backend is closed, and what a pinned session had on it is gone.
            self.handle.idle();
            let lost = self.pins.hold() && !self.carries();
            return if lost { Err(End::StateLost { node: lease.node }) } else { Ok(()) };
        }
        if !self.unit.is_quiet() {
            if self.has_committed()
                && let Some(lease) = &self.lease
            {
                self.mark.wrote();
                self.shared.positions.node(lease.node).acknowledge(self.mark.position());
            }
            self.note();
        }
        self.ddl |= self.unit.ddl;
        let queries = self.unit.commands > 0 && !self.unit.control && !self.unit.is_quiet();
        self.queried = self.status == TransactionStatus::InTransaction
            && (self.queried || queries && self.unit.before == TransactionStatus::InTransaction);
        if self.may_have_drawn()
            && let Some(lease) = &mut self.lease
        {
            lease.last_writer = Some(self.handle.pid);
        }
        self.login_settings |= self.unit.login_settings;
        let senders = &self.shared.sessions.senders;
        if senders.are_heard()
            && let Some(lease) = &self.lease
        {
            if self.unit.writes {
                // It may have begun with reads alone.
                senders.begins(&lease.cancel, self.handle.pid, Instant::now());
            }
            senders.ends(&lease.cancel, self.handle.pid, Instant::now());
        }
        let done = self.done();
        let next = self.pins.after(&done);
        if self.keeps_backend && self.lease.is_some() {
            self.pins.keep(PinReason::SessionPooling);
        }
        self.show_pins();
        if let Some(lease) = &mut self.lease {
            if done.discards_all && !done.failed {
                lease.unnamed = None;
                lease.applied = Arc::default();
                lease.dirt = Dirt::Clean;
            }
            if self.keeps_backend {
                // Not looked at what it has done there: whoever is next finds it cleaned.
                lease.dirt = lease.dirt.max(Dirt::State);
            }
            if self.pins.now().has(PinReason::Process) {
                // No command takes it away: it ends with the connection.
                lease.dirt = Dirt::Unknown;
            }
        }
        if self.unit.unproven {
            self.settings.doubt();
        }
        if self.settings.in_flux() || !self.unit.settings.is_empty() {
            self.settle_settings().await?;
        }
        if self.status != TransactionStatus::Idle && self.lazy.is_none() {
            return Ok(());
        }
        self.portals.clear();
        if std::mem::take(&mut self.login_settings) {
            self.shared.nodes.login_settings.changed();
        }
        if std::mem::take(&mut self.ddl) {
            self.catalog.invalidate();
        }
        // To which channels it listens now has to be known, should this backend be lost.
        let certain = done.before == TransactionStatus::Idle && !done.failed && done.commands == 1;
        let listens = self.pins.now().has(PinReason::Listen);
        let asks = self.listening.after(certain, listens, done.leaves.has(PinReason::Listen));
        if next == Next::Look || asks {
            self.look_at_backend().await?;
        }
        if self.role == Role::Replica && self.pins.hold() {
            // What was taken for a read has left state: a session is never held on a replica, where
            // its writes could not run. The state goes with the backend.
            self.pins = Pins::default();
            self.show_pins();
            self.lease = None;
            self.handle.idle();
        }
        if !self.pins.hold() {
            self.give_back();
        }
        Ok(())
    }

    /// Settings were changed, or may have been: once the transaction is over, it is known which.
    async fn settle_settings(&mut self) -> Result<(), End> {
        let failed = self.unit.failed();
        if !failed {
            // Fewer commands have completed than the text was thought to have.
            for (_, changes) in std::mem::take(&mut self.unit.settings) {
                self.settings.perhaps(changes);
            }
        }
        let opaque = !self.unit.leaves.is_nothing();
        let mut outcome = self.settings.ready(self.status, failed, opaque);
        if let AtReady::ReadBack(names) = outcome {
            let values = self.read_settings(&names).await?;
            let utf8 = self.lexing == Lexing::Utf8;
            outcome = self.settings.read_back(&names.into_iter().zip(values).collect::<Vec<_>>(), utf8);
        }
        if self.status != TransactionStatus::Idle {
            return Ok(());
        }
        let Some(lease) = &mut self.lease else { return Ok(()) };
        let too_much = self.settings.wanted().size() > self.config.limits.session_settings;
        if outcome == AtReady::Untracked || too_much {
            lease.dirt = lease.dirt.max(Dirt::State);
            self.pins.keep(PinReason::Setting);
            self.show_pins();
        }
        let applied = self.settings.left_behind();
        if let Some(lease) = &mut self.lease {
            lease.applied = promise::with_shown(applied, &lease.applied);
        }
        Ok(())
    }

    /// The values of settings on the leased backend: as it has reported them, or by asking.
    async fn read_settings(&mut self, names: &[String]) -> Result<Vec<Option<Vec<u8>>>, End> {
        let reported = |name: &String| {
            let parameters = self.lease.as_ref().map(|lease| &lease.parameters)?;
            let mut all = parameters.iter();
            all.find(|(key, _)| key.eq_ignore_ascii_case(name.as_bytes())).map(|(_, value)| value.to_vec())
        };
        let known: Vec<_> = names.iter().map_while(reported).map(Some).collect();
        if known.len() == names.len() {
            return Ok(known);
        }
        self.flush_client().await?;
        self.handle.idle();
        let Some(lease) = &mut self.lease else { return Ok(Vec::new()) };
        let node = lease.node;
        // The client has its answer; what it has set is gone with the backend.
        let values =
            clean::read_settings(lease, names).await.map_err(|clean::Broken| End::StateLost { node })?;
        self.hear_what_came();
        Ok(values)
    }

    /// What the unit has done, as far as it concerns pins.
    fn done(&self) -> Done {
        Done {
            leaves: self.unit.leaves.pins(),
            unproven: self.unit.unproven,
            commits_settings: self.unit.commits_settings,
            discards_all: self.unit.leaves == Leaves::DISCARDS_ALL && self.unit.discarded,
            ends: self.unit.ends,
            commands: self.unit.commands,
            rollback: self.unit.rollback,
            failed: self.unit.failed(),
            large_statements: self.pins.now().has(PinReason::LargeStatement)
                && self.statements.any_on_backend(),
            before: self.unit.before,
            after: self.status,
        }
    }

    /// What the session has on its backend cannot be told from its statements: the server is asked.
    async fn look_at_backend(&mut self) -> Result<(), End> {
        self.flush_client().await?;
        self.handle.idle();
        let Some(lease) = &mut self.lease else { return Ok(()) };
        let node = lease.node;
        // The client has its answer, but what it may have left is gone with the backend.
        let lost = |clean::Broken| End::StateLost { node };
        let look = clean::look(lease).await.map_err(lost)?;
        let had = std::mem::take(&mut lease.own_names);
        if !had.is_empty() {
            // SQL's DEALLOCATE may have taken some of them.
            match clean::statement_names(lease).await.map_err(lost)? {
                Some(has) => {
                    self.statements.keep_only(&had, &has);
                    lease.own_names = had.intersection(&has).cloned().collect();
                    // This backend has followed.
                    lease.names_of = self.statements.version();
                }
                None => lease.own_names = had,
            }
        }
        self.listening.seen(look.shown.is_some().then(|| look.listens.unwrap_or_default()));
        self.hear_what_came();
        match look.shown {
            Some(shown) => self.pins.seen(reasons(shown, self.pins.now())),
            // Whatever is there, the session keeps it.
            None if !self.pins.hold() => self.pins.add(PinReason::FunctionState),
            None => {}
        }
        if self.pins.hold()
            && let Some(lease) = &mut self.lease
        {
            // It is not hidden any more.
            lease.dirt = lease.dirt.max(Dirt::State);
        }
        self.show_pins();
        Ok(())
    }

    /// Notifications that came while the backend was asked something.
    fn hear_what_came(&mut self) {
        let Some(mut lease) = self.lease.take() else { return };
        for message in std::mem::take(&mut lease.heard) {
            self.notification(&lease, message);
        }
        self.lease = Some(lease);
    }

    /// Nothing of the session's is on the backend any more.
    fn give_back(&mut self) {
        self.handle.idle();
        if let Some(lease) = self.lease.take()
            && lease.is_between_units()
        {
            lease.give_back();
        }
    }

    /// An open unit leaves a replica between two of its messages: the backend is not at a boundary, so
    /// it is closed.
    fn leave_replica(&mut self) {
        self.note();
        self.handle.waiting();
        self.lease = None;
    }

    /// Whether the unit has ended with the commit of a write, as far as can be told, and the mark is of before it: one
    /// that others share may have moved on meanwhile.
    fn has_committed(&self) -> bool {
        let began = match self.unit.before {
            TransactionStatus::Idle => self.unit.writes,
            TransactionStatus::InTransaction => self.unit.may_commit && self.wrote,
            TransactionStatus::Failed => false,
        };
        began
            && !self.unit.failed
            && self.status == TransactionStatus::Idle
            && self.role == Role::Primary
            && self.shared_mark.is_none()
            && self.lease.as_ref().is_some_and(|lease| lease.epoch == self.mark.epoch())
    }

    /// Notes what the node has shown, after its ReadyForQuery or the loss of its connection.
    fn note(&mut self) {
        self.quorum = None;
        let Some(lease) = &self.lease else { return };
        let (node, epoch, writes) = (lease.node, lease.epoch, self.unit.writes);
        if !writes && !self.level().notes_reads() {
            return;
        }
        if self.mark.epoch() < epoch {
            // The epoch changed while the backend was being found.
            let topology = self.shared.topology.load_full();
            self.bring_mark_forward(&topology);
        }
        if self.mark.epoch() != epoch {
            return;
        }
        if self.note_for_others(node, epoch, writes) {
            return;
        }
        let note = self.shared.positions.note(node, epoch);
        let beside = self.beside(epoch);
        match self.role {
            Role::Primary => self.mark.primary_showed(note),
            // An epoch that was followed since the replica was chosen has left a note on the primary.
            Role::Replica | Role::Standby if self.mark.awaits().is_some_and(|other| other != node) => {
                let topology = self.shared.topology.load_full();
                let positions = &*self.shared.positions;
                self.mark.replica_showed_one(note, self.incarnation, beside, positions, &topology);
            }
            Role::Replica | Role::Standby => self.mark.replica_showed(note, self.incarnation, beside),
        }
    }

    /// An error of ours in place of a unit's answer. The unit's messages are dropped.
    fn fail_unit(&mut self, report: ErrorReport) -> Result<(), End> {
        self.log_failed(&report);
        let mut message = Vec::new();
        report.put(&mut message);
        self.refuse_unit(&message)
    }

    /// The same with an ErrorResponse that a server has given.
    fn refuse_unit(&mut self, message: &[u8]) -> Result<(), End> {
        self.unit = Unit::none();
        self.client.output.put_slice(message);
        if self.lazy.is_some() {
            self.status = TransactionStatus::Failed;
        }
        let Ok(Some(header)) = wire::header(&self.client.input) else { return Ok(()) };
        if matches!(header.tag, b'Q' | b'F') {
            self.drop_message(header.len);
            self.put_ready();
        } else {
            self.skipping = true;
        }
        Ok(())
    }

    async fn flush_client(&mut self) -> Result<(), End> {
        if self.client.output.is_empty() {
            return Ok(());
        }
        poll_fn(|cx| match (self.handle.poll_ending(cx), self.is_left()) {
            (Ending::Now, _) => Poll::Ready(Err(End::shutdown())),
            (_, Some(node)) => Poll::Ready(Err(End::NodeLost { node })),
            _ => self.client.poll_drain(cx).map_err(|_| End::ClientGone),
        })
        .await
    }

    /// Reads more from the client while a unit is being held back.
    async fn fill_client(&mut self) -> Result<(), End> {
        poll_fn(|cx| {
            if self.handle.poll_ending(cx) == Ending::Now {
                return Poll::Ready(Err(End::shutdown()));
            }
            if !self.client.output.is_empty()
                && let Poll::Ready(Err(_)) = self.client.poll_drain(cx)
            {
                return Poll::Ready(Err(End::ClientGone));
            }
            match self.client.poll_fill(cx) {
                Poll::Ready(Ok(n)) if n > 0 => Poll::Ready(Ok(())),
                Poll::Ready(_) => Poll::Ready(Err(End::ClientGone)),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// Says a last word, if one is due, and lets go of the backend.
    async fn close(&mut self, end: End) {
        self.handle.idle();
        self.pins = Pins::default();
        self.show_pins();
        if let Some(lease) = self.lease.take() {
            self.part_from(lease, &end).await;
        }
        self.presence.leave();
        if let End::Fatal(report) = &end {
            if report.sqlstate == "08P01" {
                self.shared.metrics.protocol_errors.inc();
            }
            if !self.unit.is_inside_answer() {
                put_report(&mut self.client.output, report);
            }
        }
        let last_words = async {
            let _ = poll_fn(|cx| self.client.poll_drain(cx)).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut self.client.stream).await;
        };
        // A client that does not read must not keep its session.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), last_words).await;
    }

    /// What becomes of the backend of a session that ends.
    async fn part_from(&self, mut lease: Lease, end: &End) {
        if !matches!(end, End::ClientGone | End::Fatal(_)) {
            return;
        }
        if !self.unit.is_over()
            && matches!(end, End::Fatal(report) if matches!(report.sqlstate, "57P01" | "25P04"))
        {
            // As a server would, we stop what runs; and before we are gone ourselves.
            lease.cancel.announce();
            let stopped = self.shared.pools.context.stop(&lease.cancel);
            let _ = tokio::time::timeout(STOPPING, stopped).await;
            return;
        }
        if !self.unit.is_over() {
            // In the middle of something: closed, never brought to an end in the client's place. What it
            // still does is stopped, unless it may be a write that was sent whole: that happens as asked.
            if !self.unit.writes || !self.unit.was_sent_whole() {
                lease.abandon();
            }
        } else if self.status == TransactionStatus::Idle && lease.is_between_units() {
            // Between two units, outside a transaction: it can be cleaned for others. At once: what hides there (it may be a
            // lock) is kept for its own session alone.
            if lease.dirt == Dirt::Hidden {
                lease.dirt = Dirt::State;
            }
            lease.give_back();
        }
    }

    fn note_loss(&mut self, what: &str, fork: &mark::Fork) {
        let mut notice = Vec::new();
        ErrorReport::error("HW001", what).detail(fork.to_string()).put_notice(&mut notice);
        self.client.output.put_slice(&notice);
    }

    /// The client is told if a change of the primary has taken, or may have taken, what it counts on.
    fn tell_of(&mut self, survival: Survival) {
        match survival {
            Survival::Kept => {}
            Survival::Unknown(fork) => {
                self.shared.metrics.lost_write.inc();
                self.note_loss("what this session has seen may have been lost in a failover", &fork);
            }
            Survival::Lost(fork) => {
                self.shared.metrics.lost_write.inc();
                match self.config.failover.lost_write {
                    LostWrite::Error => self.lost = Some(fork),
                    LostWrite::Notice => {
                        self.note_loss("what this session has written was lost in a failover", &fork);
                    }
                }
            }
        }
    }

    /// Follows the topology into its epoch, and brings the mark up to the samples.
    fn bring_mark_forward(&mut self, topology: &crate::topology::Topology) {
        let before = self.mark.epoch();
        let mut survival = self.mark.follow(&*self.shared.positions, topology);
        if before != topology.epoch
            && let Some(shared) = &self.shared_mark
        {
            let theirs = shared.survival_since(before, &*self.shared.positions, topology);
            survival = mark::worse(survival, theirs);
            self.tells = topology.epoch;
        }
        self.tell_of(survival);
        self.mark.absorb(&*self.shared.positions, topology);
        if before != topology.epoch {
            self.take_shared_mark(topology);
        }
        if let Some(quorum) = &mut self.quorum {
            quorum.absorb(&*self.shared.positions, topology);
            if let Some(reached) = quorum.reached()
                && self.shared_mark.is_none()
            {
                self.mark.covered_by(reached);
            }
        }
        let of_transaction = self.lazy.as_mut().map(|lazy| &mut lazy.freshness);
        for freshness in self.freshness.iter_mut().chain(of_transaction) {
            freshness.absorb(&*self.shared.positions, topology);
        }
    }
}

/// The reasons for which what was seen on a backend binds its session, which is bound by `now`.
fn reasons(shown: clean::Shown, now: PinSet) -> PinSet {
    let set = shown.setting && !now.has(PinReason::Setting);
    [
        (shown.temporary, PinReason::TemporaryTable),
        (shown.listening, PinReason::Listen),
        (shown.prepared, PinReason::SqlPrepare),
        (shown.hold_cursor, PinReason::HoldCursor),
        (shown.advisory_lock, PinReason::AdvisoryLock),
        (set, PinReason::FunctionState),
    ]
    .into_iter()
    .filter(|(is_there, _)| *is_there)
    .fold(PinSet::NONE, |all, (_, reason)| all | PinSet::of(reason))
}

/// PostgreSQL's words for a cancelled statement.
fn canceled() -> ErrorReport {
    ErrorReport::error("57014", "canceling statement due to user request")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<A, B, C, F>(_: impl Fn(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_session_takes_little_room() {
        let (session, future) = (size_of::<Session>(), size_of_future(Session::run));
        assert!(session <= 1792 && future <= 2304, "a session takes {session} bytes, its future {future}");
    }
}
