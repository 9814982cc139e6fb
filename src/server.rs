//! Puts the parts together: threads, runtimes, and the order in which things start and end.
//!
//! One thread runs the control plane (probes, samplers, catalog facts, HTTP), so that a busy worker
//! never delays a probe; one accepts; the workers serve clients.

mod apply;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tracing::info;

use self::apply::Applier;
use crate::admin::access::Access;
use crate::admin::{self, AdminState, Memory};
use crate::backend::pool::{CloseReason, PoolContext, Pools, Room, Ways};
use crate::catalogs::Catalogs;
use crate::classify::{Classifier, PinReason};
use crate::client::auth::AuthFailure;
use crate::client::verifiers::Verifiers;
use crate::config::Config;
use crate::config::live::LiveConfig;
use crate::console::Console;
use crate::control;
use crate::failover::event::{BlockReason, State};
use crate::gate::Gate;
use crate::listener::{self, Door};
use crate::log;
use crate::metrics::{ClassCacheFigures, CoordinationFigures, FailoverFigures, Labels, Metrics, PoolFigure};
use crate::net::{ClientTls, NodeTls};
use crate::node::Nodes;
use crate::positions::Positions;
use crate::reload::Reload;
use crate::route::{ClassLabel, RouteReason};
use crate::session::handle::Sessions;
use crate::session::ledger::Ledger;
use crate::session::pause::Pauses;
use crate::session::prepared::Names;
use crate::session::promise::PrimaryReads;
use crate::session::shared_mark::{GlobalMark, NamedMarks};
use crate::session::timeouts::Overdue;
use crate::session::{ENDED_LABELS, GATE_REFUSED_LABELS, REDONE_LABELS, Shared, UNNAMED_LABELS};
use crate::supervisor::{self, Pulse};
use crate::topology::{NodeId, Topology, TopologyHandle};

/// Why the proxy could not start.
#[derive(Debug)]
pub struct StartError {
    /// What was being tried.
    pub what: String,
    /// How it failed.
    pub cause: String,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not {}: {}", self.what, self.cause)
    }
}

impl std::error::Error for StartError {}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    let what = what.into();
    move |cause| StartError { what, cause: cause.to_string() }
}

/// Whether the proxy is to end, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Run,
    /// Those in a transaction may finish it, within `drain_timeout`.
    Drain,
    /// Nobody is waited for.
    Fast,
}

/// A running proxy; dropping it is [`shutdown`](Self::shutdown).
pub struct ServerHandle {
    /// Where clients connect.
    pub address: SocketAddr,
    /// Where HTTP is served.
    pub http: Option<SocketAddr>,
    /// What is believed of the nodes.
    pub topology: Arc<TopologyHandle>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Reads the configuration's file again.
    pub reload: Reload,
    pulse: Arc<Pulse>,
    /// Where operators' commands go.
    pub commands: control::Commands,
    /// Before the primary.
    pub gate: Arc<Gate>,
    stop: watch::Sender<Stop>,
    main: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// Ends the sessions (those in a transaction within `drain_timeout`) and all threads.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        // Not a step back, where it is in a hurry already.
        self.stop.send_if_modified(|stop| {
            *stop == Stop::Run && {
                *stop = Stop::Drain;
                true
            }
        });
        if let Some(main) = self.main.take() {
            // A panic of the main thread has been printed by its hook.
            let _ = main.join();
        }
    }
}

/// Starts the proxy and returns once it accepts clients; the nodes may still be unknown then.
pub fn start(config: Config) -> Result<ServerHandle, StartError> {
    start_with(config, None)
}

fn start_with(config: Config, level: Option<log::Level>) -> Result<ServerHandle, StartError> {
    let (stop, stopped) = watch::channel(Stop::Run);
    let (ready, started) = oneshot::channel();
    let main = std::thread::Builder::new()
        .name("hw-main".to_owned())
        .spawn(move || run_main(config, level, stopped, ready))
        .map_err(failed("start a thread"))?;
    match started.blocking_recv() {
        Ok(Ok(started)) => Ok(ServerHandle {
            address: started.address,
            http: started.http,
            topology: started.topology,
            metrics: started.metrics,
            reload: started.reload,
            pulse: started.pulse,
            commands: started.commands,
            gate: started.gate,
            stop,
            main: Some(main),
        }),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            Err(StartError { what: "start".to_owned(), cause: "the main thread ended early".to_owned() })
        }
    }
}

/// Runs the proxy until a signal. SIGTERM drains; SIGINT, or a second signal, ends all sessions at once, as
/// PostgreSQL's fast shutdown does; SIGQUIT ends the process with no words, as its immediate one. SIGHUP reloads the
/// configuration; `level` follows it.
pub fn run(config: Config, level: log::Level) -> Result<(), StartError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("start a runtime"))?;
    // Before anybody can know that we run: a signal that nobody listens for ends the process.
    let (mut terminate, mut interrupt, mut hangup) = {
        use tokio::signal::unix::{SignalKind, signal};
        let _inside = runtime.enter();
        (
            signal(SignalKind::terminate()).map_err(failed("listen for SIGTERM"))?,
            signal(SignalKind::interrupt()).map_err(failed("listen for SIGINT"))?,
            signal(SignalKind::hangup()).map_err(failed("listen for SIGHUP"))?,
        )
    };
    let server = start_with(config, Some(level))?;
    runtime.block_on(async {
        let reload = server.reload.clone();
        let status = format!("accepting clients on {}", server.address);
        supervisor::ready(&status);
        tokio::spawn(server.pulse.clone().feed());
        tokio::spawn(async move {
            while hangup.recv().await.is_some() {
                info!("SIGHUP: reloading the configuration");
                supervisor::reloading();
                // Whatever comes of it has been logged.
                let _ = reload.reload().await;
                supervisor::ready(&status);
            }
        });
        loop {
            let running = *server.stop.borrow() == Stop::Run;
            let stop = tokio::select! {
                _ = terminate.recv() => if running { Stop::Drain } else { Stop::Fast },
                _ = interrupt.recv() => Stop::Fast,
                () = server.stop.closed() => return Ok::<(), StartError>(()),
            };
            let how = match stop {
                Stop::Drain => "SIGTERM: draining",
                _ => "ending all sessions",
            };
            info!("{how}");
            supervisor::stopping(how);
            server.stop.send_replace(stop);
        }
    })?;
    server.shutdown();
    info!("stopped");
    Ok(())
}

struct Started {
    address: SocketAddr,
    http: Option<SocketAddr>,
    topology: Arc<TopologyHandle>,
    metrics: Arc<Metrics>,
    reload: Reload,
    pulse: Arc<Pulse>,
    commands: control::Commands,
    gate: Arc<Gate>,
}

fn run_main(
    config: Config,
    level: Option<log::Level>,
    stopped: watch::Receiver<Stop>,
    ready: oneshot::Sender<Result<Started, StartError>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(failed("start a runtime")(error)));
            return;
        }
    };
    runtime.block_on(async move {
        let (reload, asked) = Reload::new();
        match build(config, reload.clone()).await {
            Ok(parts) => {
                let (door, members, access) =
                    (parts.door.clone(), parts.control.members(), parts.access.clone());
                let applier = Applier { door, members, access, level };
                tokio::spawn(applier.run(asked));
                let _ = ready.send(Ok(parts.started(reload)));
                parts.run(stopped).await;
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    });
    // Tasks that wait for a name to resolve must not hold the process up.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
}

struct Parts {
    listener: TcpListener,
    listener_read_only: Option<TcpListener>,
    address: SocketAddr,
    http: Option<(TcpListener, SocketAddr)>,
    access: Arc<Access>,
    door: Arc<Door>,
    /// Of the main thread, and behind it of each worker.
    pulse: Arc<Pulse>,
    /// Holds the control loop's tasks.
    control: control::Control,
}

async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), StartError> {
    let what = || format!("listen on {address}");
    let listener = TcpListener::bind(address).await.map_err(failed(what()))?;
    let address = listener.local_addr().map_err(failed(what()))?;
    Ok((listener, address))
}

async fn build(config: Config, reload: Reload) -> Result<Parts, StartError> {
    let live = LiveConfig::new(config);
    let config = &live.load_full();
    let places = config.places();
    let tls =
        |error: crate::net::TlsError| StartError { what: "set up TLS".to_owned(), cause: error.to_string() };
    let client_tls = ClientTls::new(&config.client_tls).map_err(tls)?;
    let node_tls = Arc::new(NodeTls::new(&config.node_tls).map_err(tls)?);
    let (listener, address) = bind(&config.listen).await?;
    let listener_read_only = match &config.listen_read_only {
        Some(address) => Some(bind(address).await?.0),
        None => None,
    };
    let http = match &config.http {
        Some(address) => Some(bind(address).await?),
        None => None,
    };

    let topology = Arc::new(TopologyHandle::new(Topology::initial(config)));
    let positions = Arc::new(Positions::for_workers(places, config.workers));
    let new_gate = if config.failover.coordination.is_some() { Gate::leased } else { Gate::new };
    let gate = Arc::new(new_gate(places, config.workers, config.failover.max_paused));
    let names: Vec<String> = config.nodes.iter().map(|n| n.name.clone()).collect();
    let metrics = Arc::new(Metrics::new(&names, &labels()));
    let nodes = Nodes::new(live.clone(), &node_tls);
    let control = control::start(
        live.clone(),
        nodes.clone(),
        topology.clone(),
        positions.clone(),
        gate.clone(),
        metrics.clone(),
    )
    .map_err(|error| StartError { what: "use failover.state_dir".to_owned(), cause: error.to_string() })?;
    let catalogs = Catalogs::new(
        nodes.clone(),
        topology.clone(),
        tokio::runtime::Handle::current(),
        config.limits.databases,
    );
    let pools = Arc::new(Pools::new(Arc::new(PoolContext {
        config: live.clone(),
        tls: ArcSwap::new(node_tls),
        ways: Ways::new(places),
        positions: positions.clone(),
        topology: topology.clone(),
        metrics: metrics.clone(),
        login_settings: nodes.login_settings.clone(),
        gate: gate.clone(),
        outstanding: (0..places).map(|_| AtomicU32::new(0)).collect(),
        room: Room::new(places, config),
    })));
    let shared = Arc::new(Shared {
        config: live.clone(),
        topology: topology.clone(),
        positions,
        classifier: Arc::new(Classifier::new(&config.limits)),
        catalogs,
        nodes: nodes.clone(),
        making_room: AtomicBool::new(false),
        pools,
        gate,
        metrics,
        sessions: Arc::new(Sessions::default()),
        names: Names::new(rand::random()),
        ledger: Ledger::new(config.limits.statement_stats, config.workers),
        pauses: Pauses::default(),
        reports: control.reports(),
        global_mark: GlobalMark::unused(),
        named_marks: Mutex::new(NamedMarks::new(
            config.consistency.named_sessions,
            config.consistency.named_session_idle,
        )),
        primary_reads: PrimaryReads::default(),
        lines: log::Rate::default(),
    });
    let verifiers = Verifiers::new(config, &nodes, &topology)
        .map_err(|error| StartError { what: "set up the login".to_owned(), cause: error.to_string() })?;
    let tls = ArcSwap::from_pointee(client_tls);
    let console = Arc::new(Console::new(shared.clone(), reload, control.commands()));
    let (drain, census) = (Arc::default(), Arc::default());
    let door = Arc::new(Door { shared, tls, verifiers, drain, census, console });
    let pulse = Arc::new(Pulse::new(1 + config.workers));
    let access = Arc::new(Access::new(config.http_token.as_ref()));
    Ok(Parts { listener, listener_read_only, address, http, access, door, pulse, control })
}

impl Parts {
    fn started(&self, reload: Reload) -> Started {
        Started {
            address: self.address,
            http: self.http.as_ref().map(|(_, address)| *address),
            topology: self.door.shared.topology.clone(),
            metrics: self.door.shared.metrics.clone(),
            reload,
            pulse: self.pulse.clone(),
            commands: self.control.commands(),
            gate: self.door.shared.gate.clone(),
        }
    }

    async fn run(self, mut stopped: watch::Receiver<Stop>) {
        let live = self.door.shared.config.clone();
        let config = live.load_full();
        let (senders, receivers) = listener::handover(config.workers);
        let mut threads = Vec::new();
        let (quit, quitting) = watch::channel(false);
        tokio::spawn(self.pulse.clone().beat(0));
        for (worker, handed) in receivers.into_iter().enumerate() {
            let door = self.door.clone();
            let quitting = quitting.clone();
            let pulse = self.pulse.clone();
            let thread = std::thread::Builder::new()
                .name(format!("hw-worker-{worker}"))
                .spawn(move || run_worker(&door, handed, worker, pulse, quitting));
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::error!(%error, "could not start a worker"),
            }
        }
        let mut accepting = Vec::new();
        if let Some(listener) = self.listener_read_only {
            accepting.push(tokio::spawn(listener::accept(listener, senders.clone(), true)));
        }
        accepting.push(tokio::spawn(listener::accept(self.listener, senders, false)));
        let pools = self.door.shared.pools.clone();
        tokio::spawn(async move { pools.reap().await });
        let pools = self.door.shared.pools.clone();
        tokio::spawn(async move { pools.help().await });
        let (gate, sessions) = (self.door.shared.gate.clone(), self.door.shared.sessions.clone());
        let pools = self.door.shared.pools.clone();
        tokio::spawn(async move { pools.close_left().await });
        tokio::spawn(async move { sessions.wake_at(&gate).await });
        if let Some((listener, _)) = self.http {
            let pools = self.door.shared.pools.clone();
            let classifier = self.door.shared.classifier.clone();
            let positions = self.door.shared.positions.clone();
            let commands = self.control.commands();
            let topology = self.door.shared.topology.clone();
            let (clocks, seen) = (positions.clone(), positions.clone());
            let ids: Arc<dyn Fn() -> Vec<NodeId> + Send + Sync> =
                Arc::new(move || topology.load().nodes.iter().map(|view| view.id).collect());
            let (clocked, aged) = (ids.clone(), ids.clone());
            tokio::spawn(admin::serve(
                listener,
                AdminState {
                    topology: self.door.shared.topology.clone(),
                    metrics: self.door.shared.metrics.clone(),
                    draining: self.door.drain.flag(),
                    pools: Arc::new(move || pool_figures(&pools)),
                    class_cache: Arc::new(move || {
                        let (hits, misses) = classifier.hits_and_misses();
                        let replaced_parsers = classifier.replaced_parsers();
                        ClassCacheFigures { hits, misses, replaced_parsers }
                    }),
                    failover: Arc::new(move || failover_figures(&commands.status())),
                    clock_offsets: Arc::new(move || {
                        clocked().into_iter().map(|id| clocks.node(id).clock().map(|c| c.seconds())).collect()
                    }),
                    samples: Arc::new(move || {
                        ids().into_iter().map(|id| positions.node(id).counter()).collect()
                    }),
                    sample_ages: Arc::new(move || {
                        aged().into_iter().map(|id| seen.node(id).seen_at().map(|at| at.elapsed())).collect()
                    }),
                    access: self.access,
                    memory: Arc::new(Memory::new(config.http_history)),
                },
            ));
        }
        if let Some(address) = &config.listen_read_only {
            info!(address, "accepting clients that only read");
        }
        info!(address = %self.address, workers = config.workers, nodes = config.nodes.len(), "accepting clients");

        // An error means that the handle is gone: as good as a stop.
        let _ = stopped.wait_for(|stop| *stop != Stop::Run).await;
        // New clients are still accepted, to be told why they are not served.
        let hurry = async {
            if stopped.wait_for(|stop| *stop == Stop::Fast).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        self.door.drain.drain(&self.door.shared, Instant::now() + live.load().drain_timeout, hurry).await;
        for accepting in accepting {
            accepting.abort();
        }
        quit.send_replace(true);
        for thread in threads {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

fn run_worker(
    door: &Arc<Door>,
    handed: listener::Handover,
    worker: usize,
    pulse: Arc<Pulse>,
    mut quitting: watch::Receiver<bool>,
) {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let door = door.clone();
            runtime.block_on(async move {
                tokio::spawn(pulse.beat(1 + worker));
                let positions = door.shared.positions.clone();
                tokio::spawn(async move { positions.wake_on(worker).await });
                tokio::spawn(listener::work(door, handed, worker));
                let _ = quitting.wait_for(|quit| *quit).await;
            });
            runtime.shutdown_timeout(std::time::Duration::from_millis(200));
        }
        Err(error) => tracing::error!(%error, worker, "could not start a worker's runtime"),
    }
}

/// The values of the metrics' labels, as the parts that count define them.
fn labels() -> Labels {
    Labels {
        classes: &ClassLabel::LABELS,
        reasons: &RouteReason::LABELS,
        redone: &REDONE_LABELS,
        unnamed: &UNNAMED_LABELS,
        pins: &PinReason::LABELS,
        client_refused: &listener::REFUSED_LABELS,
        login_failures: &AuthFailure::LABELS,
        cancels: &listener::CANCEL_LABELS,
        gate_refused: &GATE_REFUSED_LABELS,
        sessions_ended: &ENDED_LABELS,
        timeouts: &Overdue::LABELS,
        backends_closed: &CloseReason::LABELS,
        failover_states: &State::LABELS,
        failover_blocks: &BlockReason::LABELS,
    }
}

fn failover_figures(status: &control::Status) -> FailoverFigures {
    FailoverFigures {
        state: status.state,
        blocked: status.blocked.as_ref().map(|(label, _)| *label),
        quarantined: status.quarantined.iter().map(|(_, why)| why.label()).collect(),
        lost_acked_bytes_min: status.loss.map(|loss| loss.acked_bytes_min),
        sync: (status.durability == "quorum").then_some(status.covered),
        coordination: status.coordination.as_ref().map(|several| CoordinationFigures {
            up: several.up,
            leads: several.leads,
            valid: several.valid,
            proxies: several.proxies.len(),
        }),
        slots_held: status.slots_held,
    }
}

fn pool_figures(pools: &Pools) -> Vec<PoolFigure> {
    let mut figures = Vec::new();
    for c in pools.counts() {
        let states =
            [("idle", c.idle), ("active", c.active), ("connecting", c.opening), ("waiting", c.waiting)];
        figures.extend(states.map(|(state, count)| PoolFigure {
            node: c.node,
            database: c.database.to_string(),
            user: c.user.to_string(),
            state,
            backends: count as u64,
        }));
    }
    figures
}
