//! One client's conversation, message by message: the place where client, route and backend meet.
//!
//! A session waits for a unit of messages, decides where it may run (`demand`, `place`), borrows a
//! backend, lets the bytes flow (`exchange`) and gives the backend back when nothing of the session's
//! is left on it. What it promises: a unit runs on one backend; a statement not shown to be a read
//! runs on the primary; no read runs on a node behind the session's mark; a unit is run a second time
//! only if it was a read and nothing of its first answer has left.

mod answers;
mod demand;
mod exchange;
pub mod handle;
pub mod mark;
mod messages;
mod place;
pub mod prepared;
mod translate;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, BytesMut};

use self::demand::Demand;
use self::exchange::{Again, HIGH_WATER, Outcome, Unit, put_report};
use self::handle::{Ending, SessionHandle, Sessions};
use self::mark::{Mark, Survival};
use self::place::Placed;
use self::prepared::{Names, Statements};
use crate::backend::pool::{Lease, Pools, UserPools};
use crate::backend::{Backend, Dirt, Parameters, StartupParameters, clean, poll_drain, poll_fill};
use crate::catalogs::{Catalogs, DatabaseCatalog};
use crate::classify::{Classifier, Leaves, Lexing, PinReason};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::net::Stream;
use crate::node::{NodeFailure, Nodes};
use crate::positions::{Incarnation, Positions};
use crate::route::{ClassLabel, RouteReason};
use crate::topology::{NodeId, TopologyHandle};
use crate::wire::{self, ErrorReport, HEADER, TransactionStatus};

/// Why units are run again, as the metric labels it.
pub const REDONE_LABELS: [&str; 4] = Again::LABELS;

/// What all sessions share.
pub struct Shared {
    /// The configuration.
    pub config: Arc<Config>,
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
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// All sessions.
    pub sessions: Arc<Sessions>,
    /// Makes prepared statements' names.
    pub names: Names,
    /// Where failures of nodes are reported.
    pub reports: crate::control::Reports,
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
}

/// The role that the leased backend's node has for this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Primary,
    Replica,
}

/// The client's side of a session.
struct ClientEnd {
    stream: Stream,
    input: BytesMut,
    output: BytesMut,
    /// It has sent its last byte.
    at_end: bool,
    /// How long a read may still take after that.
    patience: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
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
struct Registered {
    sessions: Arc<Sessions>,
    pid: u32,
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

/// One client's session.
pub struct Session {
    shared: Arc<Shared>,
    worker: usize,
    handle: Arc<SessionHandle>,
    client: ClientEnd,
    pools: Arc<UserPools>,
    startup: Arc<StartupParameters>,
    /// What its backends are to be called.
    application_name: Option<Arc<str>>,
    database: Arc<str>,
    catalog: Arc<DatabaseCatalog>,
    /// The parameters as the client was told them last.
    reported: Arc<Parameters>,
    lexing: Lexing,
    status: TransactionStatus,
    mark: Mark,
    lease: Option<Lease>,
    role: Role,
    /// The sampler connection of the replica that `lease` is on when the session was let there.
    incarnation: Incarnation,
    pin: Option<PinReason>,
    /// In this transaction code ran that is not understood: the backend is looked at when it ends.
    unproven: bool,
    /// In this transaction data definition ran: the catalog facts are read again when it ends.
    ddl: bool,
    statements: Statements,
    unit: Unit,
    /// An error of ours was sent in place of a unit: all up to Sync is dropped.
    skipping: bool,
    /// Bytes of a client's message still to be dropped.
    drop_rest: usize,
    /// Length of the client's output before the unit's answer.
    output_before: usize,
    started: Instant,
    /// A failover has lost something of the session's; its next statement says so, once.
    lost: Option<mark::Fork>,
}

impl Session {
    /// Serves a client from its login to its end.
    pub async fn run(shared: Arc<Shared>, arrival: Arrival, worker: usize) {
        // 3.2 allows long keys; 3.0 has four bytes.
        let handle = shared.sessions.register(if arrival.minor >= 2 { 32 } else { 4 });
        let _registered = Registered { sessions: shared.sessions.clone(), pid: handle.pid };
        Session::serve_arrival(&shared, arrival, worker, handle).await;
    }

    async fn serve_arrival(
        shared: &Arc<Shared>,
        mut arrival: Arrival,
        worker: usize,
        handle: Arc<SessionHandle>,
    ) {
        let application_name = arrival.startup.take_application_name();
        let pools = shared.pools.of(&arrival.database, &arrival.user, &arrival.keys);
        let topology = shared.topology.load();
        let mut session = Session {
            worker,
            handle,
            client: ClientEnd {
                stream: arrival.stream,
                input: BytesMut::new(),
                output: BytesMut::new(),
                at_end: false,
                patience: None,
            },
            pools,
            startup: Arc::new(arrival.startup),
            application_name,
            catalog: shared.catalogs.database(&arrival.database),
            database: arrival.database.into(),
            reported: Arc::default(),
            lexing: Lexing::Unsafe,
            status: TransactionStatus::Idle,
            mark: Mark::new(&*shared.positions, &topology),
            lease: None,
            role: Role::Primary,
            incarnation: Incarnation::default(),
            pin: None,
            unproven: false,
            ddl: false,
            statements: Statements::default(),
            unit: Unit::none(),
            skipping: false,
            drop_rest: 0,
            output_before: 0,
            started: Instant::now(),
            lost: None,
            shared: shared.clone(),
        };
        drop(topology);
        let end = match session.welcome().await {
            Ok(()) => session.serve().await,
            Err(end) => end,
        };
        session.close(end).await;
    }

    /// ParameterStatus, BackendKeyData, ReadyForQuery. What a server reports comes from a real login
    /// with the same startup parameters, which also lets the node refuse the client in its own words.
    async fn welcome(&mut self) -> Result<(), End> {
        let mut parameters = match self.pools.welcome(&self.startup) {
            Some(parameters) => parameters,
            None => {
                let mut lease = self.lease_for_login().await?;
                if clean::name(&mut lease, None).await.is_err() {
                    return Err(End::fatal(ErrorReport::fatal("08006", "the connection to the node broke")));
                }
                let parameters = lease.parameters.clone();
                self.pools.remember_welcome(&self.startup, &parameters);
                lease.give_back();
                parameters
            }
        };
        if let Some(name) = &self.application_name {
            Arc::make_mut(&mut parameters).insert(b"application_name".to_vec(), name.as_bytes().to_vec());
        }
        let mut out = Vec::with_capacity(512);
        for (name, value) in parameters.iter() {
            let value = if name == b"in_hot_standby" { b"off" } else { value.as_slice() };
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
        self.reported = parameters;
        self.lexing_changed();
        Ok(())
    }

    /// The client was told a parameter that decides how its texts are to be read.
    fn lexing_changed(&mut self) {
        let value = |name: &[u8]| self.reported.get(name).map(Vec::as_slice);
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
    async fn await_message(&mut self) -> Result<(), End> {
        poll_fn(|cx| {
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
                self.hear_backend(cx)?;
                if !self.client.output.is_empty()
                    && let Poll::Ready(Err(_)) =
                        poll_drain(&mut self.client.stream, &mut self.client.output, cx)
                {
                    return Poll::Ready(Err(End::ClientGone));
                }
                if self.client.output.len() >= HIGH_WATER {
                    // It asks (or listens) and does not read.
                    return Poll::Pending;
                }
                if self.client.at_end {
                    // It said nothing more; what it is owed is still written.
                    if self.client.output.is_empty() {
                        return Poll::Ready(Err(End::ClientGone));
                    }
                    return Poll::Pending;
                }
                self.shrink();
                match poll_fill(&mut self.client.stream, &mut self.client.input, cx) {
                    Poll::Ready(Ok(n)) if n > 0 => {}
                    Poll::Ready(Ok(_)) if !self.client.output.is_empty() => self.client.at_end = true,
                    Poll::Ready(_) => return Poll::Ready(Err(End::ClientGone)),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// Gives buffers back that a large message or result has grown.
    fn shrink(&mut self) {
        const KEEP: usize = 64 * 1024;
        for buffer in [&mut self.client.input, &mut self.client.output] {
            if buffer.is_empty() && buffer.capacity() > KEEP {
                *buffer = BytesMut::new();
            }
        }
    }

    /// What a held backend says while nothing runs: notifications, parameters, its end. As much of it as
    /// the client keeps up with.
    fn hear_backend(&mut self, cx: &mut std::task::Context<'_>) -> Result<(), End> {
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
                    Poll::Pending => return Ok(()),
                },
            }
        }
        Ok(())
    }

    fn heard(&mut self, backend: &mut Backend, header: wire::Header) -> Result<(), End> {
        match header.tag {
            b'A' => self.notification(backend, header.len),
            b'S' => {
                let message = backend.input.split_to(header.len);
                backend.report(&message[HEADER..]);
                self.tell_parameter(&message[HEADER..]);
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
            self.drop_message(header.len);
            if header.tag == b'S' {
                self.skipping = false;
                self.put_ready();
            }
            return Ok(());
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
        self.handle.begin();
        let result = if self.lease.is_some() { self.held_unit().await } else { self.free_unit().await };
        if self.lease.is_none() {
            self.handle.idle();
        }
        result
    }

    /// A unit of a session that holds no backend: it is routed, and perhaps run again elsewhere.
    async fn free_unit(&mut self) -> Result<(), End> {
        let mut demand = match self.demand().await? {
            Demand::Ours => return Ok(()),
            demand => demand,
        };
        let mut avoid: Vec<NodeId> = Vec::new();
        loop {
            if self.handle.is_cancelled() {
                return self.fail_unit(canceled());
            }
            let mut placed = match self.place(&demand, &avoid).await? {
                Ok(placed) => placed,
                Err(report) => return self.fail_unit(report),
            };
            if self.make_ready(&mut placed.lease, &demand).await.is_err() {
                self.shared.reports.report_failure(placed.node, NodeFailure::Broken);
                if avoid.contains(&placed.node) {
                    let report = ErrorReport::error("08006", "the connection to the node broke")
                        .detail("The statement was not sent to it.");
                    return self.fail_unit(report);
                }
                // Nothing of the unit was sent. (A primary is asked once more: there is no other.)
                avoid.push(placed.node);
                continue;
            }
            self.flush_client().await?;
            if !self.handle.running(&placed.lease.cancel) {
                // The cancel came when the backend had just been found.
                placed.lease.give_back();
                return self.fail_unit(canceled());
            }
            let (node, reason) = (placed.node, placed.reason);
            let told_before = self.reported.clone();
            self.begin_on(placed, &demand);
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
                    if avoid.len() > self.shared.config.nodes.len() + 2 {
                        let report = ErrorReport::error("08006", "the connection to the node broke")
                            .detail("The read was tried on every node.");
                        return self.fail_unit(report);
                    }
                    demand.redo(again);
                }
                Ok(Outcome::Move) => {
                    self.count(node, demand.label(), reason);
                    self.leave_replica();
                    self.started = Instant::now();
                    demand = match self.demand().await? {
                        Demand::Ours => return Ok(()),
                        demand => demand,
                    };
                }
                Err(end) => return Err(self.ended(end)),
            }
        }
    }

    /// What a backend needs before a unit of this session may run on it.
    async fn make_ready(&self, backend: &mut Backend, demand: &Demand) -> Result<(), clean::Broken> {
        clean::name(backend, self.application_name.as_ref()).await?;
        if demand.leaves() == Leaves::Pins(PinReason::Other) {
            clean::forget_sequences(backend, self.handle.pid).await?;
        }
        Ok(())
    }

    /// The unit starts on a backend that was found for it.
    fn begin_on(&mut self, placed: Placed, demand: &Demand) {
        self.unit = Unit::new(demand.is_read(), demand.vetted());
        self.count_demand(demand);
        self.output_before = self.client.output.len();
        self.tell_differences(&placed.lease.parameters);
        self.role = placed.role;
        self.lease = Some(placed.lease);
    }

    /// What is known of a unit from how it was routed.
    fn count_demand(&mut self, demand: &Demand) {
        self.unit.leaves = demand.leaves();
        self.unit.writes = !demand.is_read();
        self.unit.ddl = demand.is_ddl();
    }

    /// A unit in a transaction or on a pinned backend: there is nothing to decide.
    async fn held_unit(&mut self) -> Result<(), End> {
        let demand = match self.demand_held() {
            Some(Demand::Ours) => return Ok(()),
            Some(demand) => Some(demand),
            None => None,
        };
        if self.role == Role::Primary && self.status == TransactionStatus::Idle {
            // A pinned session's mark holds for its backend, too.
            if let Err(report) = self.await_primary().await? {
                return self.fail_unit(report);
            }
        }
        let Some(lease) = &self.lease else { return Ok(()) };
        let node = lease.node;
        if self.role == Role::Primary && lease.epoch != self.shared.topology.load().epoch {
            // Whatever it is, it is the primary no more: not one byte of a statement for it.
            return Err(End::NodeLost { node });
        }
        if !self.handle.running(&lease.cancel) {
            if self.status == TransactionStatus::Idle {
                return self.fail_unit(canceled());
            }
            // In a transaction only the backend could fail it; and one server ignores a cancel that
            // finds it idle.
            self.handle.begin();
            let _ = self.handle.running(&lease.cancel);
        }
        let reason = if self.pin.is_some() { RouteReason::Pinned } else { RouteReason::InTransaction };
        self.unit = Unit::new(false, 0);
        if let Some(demand) = &demand {
            self.count_demand(demand);
        }
        self.output_before = self.client.output.len();
        match self.exchange().await {
            // Nothing moves off a primary; a session held on a replica would try for ever.
            Ok(Outcome::Move | Outcome::Again(_)) => Err(End::NodeLost { node }),
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
        if self.pin.is_none() {
            self.pin = Some(reason);
            self.shared.metrics.pins.inc(reason.label());
            self.shared.metrics.pinned_sessions.inc();
        }
    }

    fn count(&self, node: NodeId, class: ClassLabel, reason: RouteReason) {
        self.shared.metrics.statement(node, class as usize, reason as usize);
        self.shared.metrics.statement_took(node, self.started.elapsed());
    }

    /// The unit ran on a replica that could not serve it: where it must not go again, and what is
    /// learned. Whether the client has cancelled it meanwhile: then it is not run again.
    fn take_back(&mut self, again: Again, node: NodeId, avoid: &mut Vec<NodeId>) -> bool {
        self.shared.metrics.redone.inc(again.label());
        if again == Again::NotARead {
            self.learn();
        }
        // From here on a cancel finds the session waiting.
        self.handle.waiting();
        let lease = self.lease.take();
        let cancelled = lease.as_ref().is_some_and(|lease| lease.cancel.was_sent());
        match again {
            Again::NotARead | Again::LateReplica | Again::Conflict => {
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
        cancelled
    }

    /// After a unit's answers: notes, pins, and what becomes of the backend.
    async fn finish(&mut self) -> Result<(), End> {
        self.note();
        let failed = self.unit.failed();
        self.ddl |= self.unit.ddl;
        if self.unit.writes
            && let Some(lease) = &mut self.lease
        {
            lease.last_writer = Some(self.handle.pid);
        }
        match self.unit.leaves {
            Leaves::Nothing => {}
            Leaves::Pins(reason) => self.pin_now(reason),
            Leaves::Unproven => self.unproven = true,
            Leaves::DiscardsAll if !failed => {
                if let Some(lease) = &mut self.lease {
                    lease.unnamed = None;
                    lease.application_name = None;
                    lease.dirt = Dirt::Clean;
                }
                if self.pin.take().is_some() {
                    self.shared.metrics.pinned_sessions.dec();
                }
            }
            // What they do to the statements was taken into account when they completed.
            Leaves::DiscardsAll | Leaves::DeallocatesAll => {}
        }
        if self.status != TransactionStatus::Idle {
            return Ok(());
        }
        if std::mem::take(&mut self.ddl) {
            self.catalog.invalidate();
        }
        if self.pin.is_none() && std::mem::take(&mut self.unproven) {
            self.look_at_backend().await?;
        }
        if self.role == Role::Replica && self.pin.take().is_some() {
            // What was taken for a read has left state: a session is never held on a replica, where
            // its writes could not run. The state goes with the backend.
            self.shared.metrics.pinned_sessions.dec();
            self.lease = None;
            self.handle.idle();
        }
        if self.pin.is_none() {
            self.give_back();
        }
        Ok(())
    }

    /// Code that is not understood has run: if it left session state, the session keeps the backend.
    async fn look_at_backend(&mut self) -> Result<(), End> {
        self.flush_client().await?;
        self.handle.idle();
        let Some(lease) = &mut self.lease else { return Ok(()) };
        let node = lease.node;
        match clean::look(lease).await {
            Ok(clean::Left::Nothing) => Ok(()),
            Ok(clean::Left::State) => {
                self.pin_now(PinReason::FunctionState);
                Ok(())
            }
            // The client has its answer, but what it may have left is gone with the backend.
            Err(clean::Broken) => Err(End::StateLost { node }),
        }
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

    /// Notes what the node has shown, after its ReadyForQuery or the loss of its connection.
    fn note(&mut self) {
        let Some(lease) = &self.lease else { return };
        let (node, epoch) = (lease.node, lease.epoch);
        if self.mark.epoch() < epoch {
            // The epoch changed while the backend was being found.
            let topology = self.shared.topology.load_full();
            self.bring_mark_forward(&topology);
        }
        if self.mark.epoch() == epoch {
            let note = self.shared.positions.note(node, epoch);
            match self.role {
                Role::Primary => self.mark.primary_showed(note),
                Role::Replica => self.mark.replica_showed(note, self.incarnation),
            }
        }
    }

    /// An error of ours in place of a unit's answer. The unit's messages are dropped.
    fn fail_unit(&mut self, report: ErrorReport) -> Result<(), End> {
        put_report(&mut self.client.output, &report);
        let Ok(Some(header)) = wire::header(&self.client.input) else { return Ok(()) };
        if matches!(header.tag, b'Q' | b'F') {
            self.drop_message(header.len);
            self.put_ready();
        } else {
            self.skipping = true;
        }
        Ok(())
    }

    /// Whether the session can go on after `end`.
    fn survive(&mut self, end: End) -> Result<(), End> {
        let (node, state_lost) = match end {
            End::NodeLost { node } => (node, false),
            End::StateLost { node } => (node, true),
            end => return Err(end),
        };
        let node_name = &self.shared.config.nodes[node.index()].name;
        let in_transaction = self.status != TransactionStatus::Idle;
        let between_units = self.unit.is_over();
        if !between_units && self.unit.writes {
            self.shared.metrics.unknown_outcomes.inc();
        }
        if state_lost || self.pin.is_some() || in_transaction || !self.unit.was_sent_whole() || between_units
        {
            return Err(End::fatal(
                ErrorReport::fatal(
                    "57P01",
                    format!("terminating connection because node \"{node_name}\" was lost"),
                )
                .detail("The transaction or session state on it is gone.")
                .hint("In a moment you should be able to reconnect and repeat your command."),
            ));
        }
        if self.unit.is_inside_answer() {
            // Nothing can be said in the middle of a message.
            return Err(end);
        }
        self.lease = None;
        self.handle.idle();
        let report = if self.unit.writes {
            ErrorReport::error("08007", "transaction resolution unknown")
                .detail(format!("The connection to node \"{node_name}\" was lost before it answered; the statement may or may not have taken effect."))
        } else {
            ErrorReport::error("08006", format!("connection to node \"{node_name}\" lost"))
                .detail("Part of the result had been sent already.")
        };
        put_report(&mut self.client.output, &report);
        self.statements.failed(false);
        self.unit = Unit::none();
        self.put_ready();
        Ok(())
    }

    async fn flush_client(&mut self) -> Result<(), End> {
        if self.client.output.is_empty() {
            return Ok(());
        }
        poll_fn(|cx| match self.handle.poll_ending(cx) {
            Ending::Now => Poll::Ready(Err(End::shutdown())),
            _ => {
                poll_drain(&mut self.client.stream, &mut self.client.output, cx).map_err(|_| End::ClientGone)
            }
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
                && let Poll::Ready(Err(_)) = poll_drain(&mut self.client.stream, &mut self.client.output, cx)
            {
                return Poll::Ready(Err(End::ClientGone));
            }
            match poll_fill(&mut self.client.stream, &mut self.client.input, cx) {
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
        if self.pin.is_some() {
            self.shared.metrics.pinned_sessions.dec();
        }
        if let Some(lease) = self.lease.take() {
            self.part_from(lease, &end);
        }
        if let End::Fatal(report) = &end {
            if report.sqlstate == "08P01" {
                self.shared.metrics.protocol_errors.inc();
            }
            if !self.unit.is_inside_answer() {
                put_report(&mut self.client.output, report);
            }
        }
        let last_words = async {
            let _ = poll_fn(|cx| poll_drain(&mut self.client.stream, &mut self.client.output, cx)).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut self.client.stream).await;
        };
        // A client that does not read must not keep its session.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), last_words).await;
    }

    /// What becomes of the backend of a session that ends.
    fn part_from(&self, lease: Lease, end: &End) {
        if !matches!(end, End::ClientGone | End::Fatal(_)) {
            return;
        }
        if !self.unit.is_over() {
            // In the middle of something: closed, never brought to an end in the client's place. What it
            // still does is stopped, unless it may be a write that was sent whole: that happens as asked.
            if !self.unit.writes || !self.unit.was_sent_whole() {
                lease.abandon();
            }
        } else if self.status == TransactionStatus::Idle && lease.is_between_units() {
            // Between two units, outside a transaction: it can be cleaned for others.
            lease.give_back();
        }
    }

    /// Follows the topology into its epoch, and brings the mark up to the samples.
    fn bring_mark_forward(&mut self, topology: &crate::topology::Topology) {
        match self.mark.follow(&*self.shared.positions, topology) {
            Survival::Kept => {}
            Survival::Unknown(fork) => {
                self.shared.metrics.lost_write.inc();
                let mut notice = Vec::new();
                ErrorReport::error("HW001", "what this session has seen may have been lost in a failover")
                    .detail(fork.to_string())
                    .put_notice(&mut notice);
                self.client.output.put_slice(&notice);
            }
            Survival::Lost(fork) => {
                self.shared.metrics.lost_write.inc();
                self.lost = Some(fork);
            }
        }
        self.mark.absorb(&*self.shared.positions, topology);
    }
}

/// PostgreSQL's words for a cancelled statement.
fn canceled() -> ErrorReport {
    ErrorReport::error("57014", "canceling statement due to user request")
}
