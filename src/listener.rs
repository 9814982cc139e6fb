//! Accepts clients, counts and limits them, hands each to a worker, and drains them at the end.
//!
//! Each worker is a thread with a runtime of its own; a session never leaves its worker, so that its
//! reads, writes and wake-ups stay on one core. Accepting happens on one thread, which deals clients
//! out to the workers in turn.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::backend::StartupParameters;
use crate::client::auth::{self, AuthFailure, Purpose};
use crate::client::startup::{self, GreetError, Greeting, Startup};
use crate::client::verifiers::Verifiers;
use crate::config::{Config, PoolOverride};
use crate::console::{self, Console};
use crate::net::{self, ClientTls};
use crate::session::handle::{CancelOutcome, Ending};
use crate::session::{Arrival, Session, Shared, first_mark, replication};
use crate::wire::ErrorReport;

/// Accepted clients on their way to one worker.
const HANDOVER: usize = 1024;

/// Why connections are refused before their login, as the metric labels it.
pub const REFUSED_LABELS: [&str; 12] = [
    "timeout",
    "tls",
    "gone",
    "protocol",
    "draining",
    "too_many",
    "reserved",
    "too_many_of_user",
    "too_many_in_database",
    "replication",
    "no_replica",
    "console",
];

/// What becomes of cancel requests, as the metric labels it.
pub const CANCEL_LABELS: [&str; 4] = ["nothing", "while_waiting", "forwarded", "failed"];

/// What it takes to turn a connection into a session.
pub struct Door {
    /// What sessions share.
    pub shared: Arc<Shared>,
    /// TLS towards clients.
    pub tls: ArcSwap<ClientTls>,
    /// Who may log in.
    pub verifiers: Verifiers,
    /// Counts clients and ends them.
    pub drain: Arc<Drain>,
    /// Counts those whose number is limited apart.
    pub census: Arc<Census>,
    /// The admin console.
    pub console: Arc<Console>,
}

/// What a client is let in to.
enum Mode {
    Session,
    /// What it asked for by `replication`.
    Replication(String),
    Console,
}

/// How many clients there are, and whether new ones are welcome.
#[derive(Default)]
pub struct Drain {
    clients: AtomicUsize,
    /// Of these: who may stay, or has not been turned away yet.
    places: AtomicUsize,
    draining: Arc<AtomicBool>,
    gone: Notify,
}

impl Drain {
    /// Whether the proxy is shutting down.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// The flag itself, for `admin`.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.draining.clone()
    }

    /// Connections now, logged in or not.
    pub fn clients(&self) -> usize {
        self.clients.load(Ordering::SeqCst)
    }

    fn places(&self) -> usize {
        self.places.load(Ordering::SeqCst)
    }

    fn enter(self: &Arc<Drain>) -> Present {
        self.clients.fetch_add(1, Ordering::SeqCst);
        self.places.fetch_add(1, Ordering::SeqCst);
        Present { drain: self.clone(), has_place: true }
    }

    /// No new clients; those who are there end when they are idle, and at `deadline` in any case; or at
    /// once, when `hurry` resolves.
    pub async fn drain(&self, shared: &Shared, deadline: Instant, hurry: impl Future<Output = ()>) {
        self.draining.store(true, Ordering::SeqCst);
        shared.sessions.end_all(Ending::WhenIdle);
        let empty = tokio::select! {
            biased;
            () = hurry => false,
            empty = self.empty_by(deadline) => empty,
        };
        if !empty {
            warn!(clients = self.clients(), "ending the sessions that are left");
            shared.sessions.end_all(Ending::Now);
            self.empty_by(Instant::now() + Duration::from_secs(2)).await;
        }
    }

    async fn empty_by(&self, deadline: Instant) -> bool {
        loop {
            let gone = self.gone.notified();
            tokio::pin!(gone);
            gone.as_mut().enable();
            if self.clients() == 0 {
                return true;
            }
            if tokio::time::timeout_at(deadline, gone).await.is_err() {
                return self.clients() == 0;
            }
        }
    }
}

/// A client that is counted as long as this lives.
struct Present {
    drain: Arc<Drain>,
    has_place: bool,
}

impl Present {
    /// It is being turned away: from before it is told so, it keeps nobody else out.
    fn leave_place(&mut self) {
        if std::mem::take(&mut self.has_place) {
            self.drain.places.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.leave_place();
        self.drain.clients.fetch_sub(1, Ordering::SeqCst);
        self.drain.gone.notify_waiters();
    }
}

/// Sessions of users, in databases, and replication connections, all of them, as a reload may limit whom nobody
/// has limited before. As many entries as there are users and databases with sessions.
#[derive(Default)]
pub struct Census(Mutex<HashMap<Counted, usize>>);

/// What is counted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Counted {
    User(Box<str>),
    Database(Box<str>),
    Replication,
    Console,
    /// On its way there, above `max_clients`.
    ConsoleLogin,
}

/// Places in the census that are taken as long as this lives.
struct Places {
    census: Arc<Census>,
    taken: Vec<Counted>,
}

impl Drop for Places {
    fn drop(&mut self) {
        let mut counts = self.census.0.lock().unwrap_or_else(|p| p.into_inner());
        for counted in &self.taken {
            if let Some(count) = counts.get_mut(counted) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(counted);
                }
            }
        }
    }
}

impl Census {
    fn count(&self, counted: &Counted) -> usize {
        self.0.lock().unwrap_or_else(|p| p.into_inner()).get(counted).copied().unwrap_or(0)
    }

    /// Counts one more of each of `wanted`, or of none: then the first that is full is given. `None`: no limit.
    fn enter(self: &Arc<Census>, wanted: Vec<(Counted, Option<usize>)>) -> Result<Places, Counted> {
        let mut counts = self.0.lock().unwrap_or_else(|p| p.into_inner());
        let full = |(counted, most): &&(Counted, Option<usize>)| {
            most.is_some_and(|most| counts.get(counted).copied().unwrap_or(0) >= most)
        };
        if let Some((counted, _)) = wanted.iter().find(full) {
            return Err(counted.clone());
        }
        let taken: Vec<Counted> = wanted.into_iter().map(|(counted, _)| counted).collect();
        for counted in &taken {
            *counts.entry(counted.clone()).or_default() += 1;
        }
        Ok(Places { census: self.clone(), taken })
    }
}

/// What a client counts as, and the limits that hold apart from `max_clients`.
fn limits_of(
    config: &Config,
    user: &str,
    database: &str,
    replication: bool,
) -> Vec<(Counted, Option<usize>)> {
    let limit = |list: &[PoolOverride], name: &str| list.iter().find(|o| o.name == name)?.max_clients;
    let mut limits = vec![
        (Counted::User(user.into()), limit(&config.pool.users, user)),
        (Counted::Database(database.into()), limit(&config.pool.databases, database)),
    ];
    if replication {
        limits.insert(0, (Counted::Replication, Some(config.replication.max_connections)));
    }
    limits
}

/// A client on its way to a worker.
pub struct Accepted {
    tcp: std::net::TcpStream,
    read_only: bool,
}

/// One worker's end of the handover.
pub type Handover = mpsc::Receiver<Accepted>;

/// The workers' ends, to be given to as many threads, and the acceptor's.
pub fn handover(workers: usize) -> (Vec<mpsc::Sender<Accepted>>, Vec<Handover>) {
    (0..workers).map(|_| mpsc::channel(HANDOVER)).unzip()
}

/// Accepts for ever, and deals clients out to the workers in turn. `read_only`: they have come by the
/// port of that name.
pub async fn accept(listener: TcpListener, workers: Vec<mpsc::Sender<Accepted>>, read_only: bool) {
    let mut next = 0;
    loop {
        let tcp = match listener.accept().await {
            Ok((tcp, _)) => tcp,
            Err(error) => {
                // Out of descriptors, or a client that left before it was accepted: neither ends the
                // proxy, and the former needs time to pass.
                warn!(%error, "could not accept a client");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(tcp) = tcp.into_std() else { continue };
        next = (next + 1) % workers.len();
        if workers[next].send(Accepted { tcp, read_only }).await.is_err() {
            return;
        }
    }
}

/// One worker: serves the clients it is handed, each as a task of its own.
pub async fn work(door: Arc<Door>, mut handed: Handover, worker: usize) {
    while let Some(Accepted { tcp, read_only }) = handed.recv().await {
        match TcpStream::from_std(tcp) {
            Ok(tcp) => {
                let door = door.clone();
                tokio::spawn(async move { door.serve(tcp, worker, read_only).await });
            }
            Err(error) => warn!(%error, "could not take over a client"),
        }
    }
}

/// A client whose coming was logged (`log.connections`), as its going will be.
struct Said {
    peer: String,
    user: String,
    database: String,
    since: Instant,
}

impl Said {
    fn come(peer: Option<SocketAddr>, arrival: &Arrival, replication: bool) -> Said {
        let peer = peer.map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
        let (user, database) = (arrival.user.clone(), arrival.database.clone());
        let read_only = arrival.read_only;
        info!(peer, user, database, read_only, replication, "client connected");
        Said { peer, user, database, since: Instant::now() }
    }

    fn gone(self) {
        let Said { peer, user, database, since } = self;
        info!(peer, user, database, seconds = since.elapsed().as_secs_f64(), "client disconnected");
    }
}

impl Door {
    async fn serve(self: Arc<Door>, tcp: TcpStream, worker: usize, read_only: bool) {
        let peer = tcp.peer_addr().ok();
        let mut present = self.drain.enter();
        self.shared.metrics.clients.inc();
        self.shared.metrics.clients_total.inc();
        self.serve_counted(&mut present, tcp, peer, worker, read_only).await;
        self.shared.metrics.clients.dec();
        drop(present);
    }

    async fn serve_counted(
        &self,
        present: &mut Present,
        tcp: TcpStream,
        peer: Option<SocketAddr>,
        worker: usize,
        read_only: bool,
    ) {
        // Boxed, and so gone before the session begins: most sessions only wait, and that in little room.
        let let_in = Box::pin(self.let_in(present, tcp, peer, read_only)).await;
        let Some((_places, arrival, mode)) = let_in else { return };
        let metrics = &self.shared.metrics;
        let replicates = matches!(mode, Mode::Replication(_));
        let said = self.shared.config.load().log.connections.then(|| Said::come(peer, &arrival, replicates));
        match mode {
            Mode::Session => Session::run(self.shared.clone(), arrival, worker).await,
            Mode::Console => {
                metrics.console_connections.inc();
                Box::pin(self.console.serve(*arrival)).await;
                metrics.console_connections.dec();
            }
            Mode::Replication(mode) => {
                metrics.replication_connections.inc();
                Box::pin(replication::run(self.shared.clone(), *arrival, mode)).await;
                metrics.replication_connections.dec();
            }
        }
        if let Some(said) = said {
            said.gone();
        }
    }

    /// Greets a client and has it prove who it is. `None`: it was told what there is to say.
    async fn let_in(
        &self,
        present: &mut Present,
        tcp: TcpStream,
        peer: Option<SocketAddr>,
        read_only: bool,
    ) -> Option<(Places, Box<Arrival>, Mode)> {
        let metrics = &self.shared.metrics;
        let deadline = {
            let config = self.shared.config.load();
            if let Err(error) = net::set_client_options(&tcp, &config.client_tcp) {
                debug!(%error, "could not set socket options");
            }
            Instant::now() + config.auth.login_timeout
        };
        let tls = self.tls.load_full();
        let mut connection = match startup::greet(tcp, &tls, deadline).await {
            Ok(Greeting::Login(connection)) => connection,
            Ok(Greeting::Cancel { pid, key, connection }) => {
                self.cancel(pid, &key).await;
                // Only now: who asked takes the end of the connection for the end of the matter.
                drop(connection);
                return None;
            }
            Ok(Greeting::Gone) => return None,
            Err(error) => {
                metrics.client_refused.inc(match error {
                    GreetError::Timeout => "timeout",
                    GreetError::Tls(_) => "tls",
                    GreetError::Io(_) => "gone",
                    GreetError::Nonsense(_) | GreetError::Refused(_) => "protocol",
                });
                debug!(?peer, %error, "client refused before its login");
                return None;
            }
        };
        // Held until the login is over.
        let _place = match self.admit(&connection.startup, read_only) {
            Ok(place) => place,
            Err((label, report)) => {
                metrics.client_refused.inc(label);
                present.leave_place();
                say_last(&mut connection.stream, &report).await;
                return None;
            }
        };
        let config = self.shared.config.load_full();
        let to_console = is_for_console(&config, &connection.startup);
        let purpose = match to_console {
            true => Purpose::Console { admins: &config.auth.admins, database: &config.control.database },
            false => Purpose::Nodes,
        };
        let mark = (!to_console && connection.startup.replication.is_none()).then(|| {
            Box::new(first_mark(&self.shared, &connection.startup.user, &connection.startup.database))
        });
        let keys = match auth::authenticate(&mut connection, &self.verifiers, purpose, deadline).await {
            Ok(keys) => keys,
            Err(failure) => {
                match &failure {
                    AuthFailure::NoVerifier(error) => warn!(?peer, %error, "nobody can say who may log in"),
                    AuthFailure::Gone => {}
                    other => info!(?peer, user = connection.startup.user, error = %other, "login failed"),
                }
                metrics.login_failures.inc(failure.label());
                return None;
            }
        };
        let (mut stream, startup) = (connection.stream, connection.startup);
        // Only now: who cannot log in must not take another's place.
        let places = match self.count(&startup, to_console) {
            Ok(places) => places,
            Err((label, report)) => {
                metrics.client_refused.inc(label);
                present.leave_place();
                say_last(&mut stream, &report).await;
                return None;
            }
        };
        let mut parameters = startup.parameters;
        if read_only {
            parameters.retain(|(name, _)| name != READ_ONLY);
            parameters.push((READ_ONLY.to_owned(), "on".to_owned()));
        }
        // Sessions share backends whatever the order; but of one name, the last value counts.
        parameters.sort_by_key(|(name, _)| name.to_ascii_lowercase());
        // Boxed: each future on its way to the session would keep room for it as long as that lives.
        let arrival = Box::new(Arrival {
            stream,
            user: startup.user,
            database: startup.database,
            startup: StartupParameters(parameters),
            minor: startup.minor,
            keys,
            read_only,
            peer,
            mark,
        });
        let mode = match startup.replication {
            _ if to_console => Mode::Console,
            Some(mode) => Mode::Replication(mode),
            None => Mode::Session,
        };
        Some((places, arrival, mode))
    }

    /// Whether there is room for a client that has not logged in yet; else the metric's label and what it
    /// is told.
    fn admit(&self, startup: &Startup, read_only: bool) -> Result<Option<Places>, Refusal> {
        if self.drain.is_draining() {
            return Err((
                "draining",
                Box::new(ErrorReport::fatal("57P03", "the database system is shutting down")),
            ));
        }
        let config = self.shared.config.load();
        // Those on the console have places of their own.
        let consoles = self.census.count(&Counted::Console);
        let clients = self.drain.places().saturating_sub(consoles);
        if is_for_console(&config, startup) {
            return self.admit_to_console(&config, startup, clients);
        }
        if clients > config.max_clients {
            return Err((
                "too_many",
                Box::new(ErrorReport::fatal("53300", "sorry, too many clients already")),
            ));
        }
        // It only says who it is. Should it be a lie, it has the place until its login fails.
        let reserved = config.max_clients - config.reserved_clients;
        if clients > reserved && !config.auth.admins.contains(&startup.user) {
            let words = "remaining connection slots are reserved for roles in auth.admins";
            return Err(("reserved", Box::new(ErrorReport::fatal("53300", words))));
        }
        if read_only && self.shared.topology.load().serving_replicas().next().is_none() {
            // Before the login: only then does libpq try the next of several addresses.
            return Err(("no_replica", Box::new(ErrorReport::fatal("57P03", "no replica is in service"))));
        }
        if startup.replication.is_some() && read_only {
            let words = "replication connections are served by the primary only";
            let report =
                ErrorReport::fatal("0A000", words).hint("Connect to the port for reading and writing.");
            return Err(("replication", Box::new(report)));
        }
        Ok(None)
    }

    /// The same for the console: above `max_clients` only who says that it is an administrator, and at most as many
    /// at a time as there are places. Those who are just being turned away do not count: in a storm of them an
    /// administrator is needed.
    fn admit_to_console(
        &self,
        config: &Config,
        startup: &Startup,
        clients: usize,
    ) -> Result<Option<Places>, Refusal> {
        if startup.replication.is_some() {
            let report =
                ErrorReport::fatal("0A000", "the admin console does not speak the replication protocol");
            return Err(("console", Box::new(report)));
        }
        if clients <= config.max_clients {
            return Ok(None);
        }
        let full = ("too_many", Box::new(ErrorReport::fatal("53300", "sorry, too many clients already")));
        if !config.auth.admins.contains(&startup.user) {
            return Err(full);
        }
        let most = config.limits.admin_connections;
        self.census.enter(vec![(Counted::ConsoleLogin, Some(most))]).map(Some).map_err(|_| full)
    }

    /// Counts a client that has logged in, in PostgreSQL's words where it is one too many.
    fn count(&self, startup: &Startup, to_console: bool) -> Result<Places, Refusal> {
        let (user, database) = (&startup.user, &startup.database);
        let config = self.shared.config.load();
        let limits = if to_console {
            vec![(Counted::Console, Some(config.limits.admin_connections))]
        } else {
            limits_of(&config, user, database, startup.replication.is_some())
        };
        let report = |words| ErrorReport::fatal("53300", words);
        let refused = |full| match full {
            Counted::User(_) => {
                ("too_many_of_user", report(format!("too many connections for role \"{user}\"")))
            }
            Counted::Database(_) => {
                ("too_many_in_database", report(format!("too many connections for database \"{database}\"")))
            }
            Counted::Replication => {
                let most = config.replication.max_connections;
                let words = format!("number of requested replication connections exceeds {most}");
                ("replication", report(words).hint("Raise replication.max_connections."))
            }
            Counted::Console | Counted::ConsoleLogin => {
                let words = "too many connections to the admin console".to_owned();
                ("console", report(words).hint("Raise limits.admin_connections."))
            }
        };
        self.census.enter(limits).map_err(|full| {
            let (why, report) = refused(full);
            (why, Box::new(report))
        })
    }

    async fn cancel(&self, pid: i32, key: &[u8]) {
        let outcome = self
            .shared
            .sessions
            .cancel(pid, key, |target| async move { self.shared.pools.context.cancel(&target).await })
            .await;
        self.shared.metrics.cancels.inc(match outcome {
            CancelOutcome::Nothing => "nothing",
            CancelOutcome::WhileWaiting => "while_waiting",
            CancelOutcome::Forwarded => "forwarded",
            CancelOutcome::Failed => "failed",
        });
    }
}

/// Whether a client asks for the console, where there is one.
fn is_for_console(config: &Config, startup: &Startup) -> bool {
    config.limits.admin_connections > 0 && startup.database == console::DATABASE
}

/// The metric's label of a refusal, and what the client is told.
type Refusal = (&'static str, Box<ErrorReport>);

/// The startup parameter by which sessions of the read-only port are what they say they are: on their own
/// backends, even should a replica be promoted under one of them.
const READ_ONLY: &str = "default_transaction_read_only";

/// Tells a client why it is not served.
async fn say_last(stream: &mut net::Stream, report: &ErrorReport) {
    let mut out = Vec::new();
    report.put(&mut out);
    let said = async {
        stream.write_all(&out).await?;
        stream.shutdown().await
    };
    let _: Result<io::Result<()>, _> = tokio::time::timeout(Duration::from_secs(1), said).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_waits_takes_little_room() {
        fn size_of_future<A, B, C, D, E, F>(_: impl Fn(A, B, C, D, E) -> F) -> usize {
            size_of::<F>()
        }
        let (future, arrival) = (
            size_of_future(|door: Arc<Door>, tcp, worker, read_only, (): ()| {
                door.serve(tcp, worker, read_only)
            }),
            size_of::<Arrival>(),
        );
        assert!(
            future <= 2400 && arrival <= 184,
            "the future that serves a client takes {future} bytes, an arrival {arrival}"
        );
    }

    #[test]
    fn places_are_counted_all_or_none_and_given_back() {
        let census = Arc::new(Census::default());
        let (user, database) = (Counted::User("u".into()), Counted::Database("d".into()));
        let (two_users, one_database) = ((user.clone(), Some(2)), (database.clone(), Some(1)));
        let both = || vec![two_users.clone(), one_database.clone()];
        let first = census.enter(both()).ok();
        assert_eq!(census.enter(both()).err(), Some(database.clone()));
        let second = census.enter(vec![two_users.clone()]).ok();
        assert_eq!(census.enter(vec![two_users.clone()]).err(), Some(user.clone()));
        drop(first);
        assert!(census.enter(both()).is_ok());
        assert!(census.enter(vec![]).is_ok());
        drop(second);
        assert_eq!(census.enter(vec![(Counted::Replication, Some(0))]).err(), Some(Counted::Replication));
        assert!(census.0.lock().unwrap().is_empty(), "what nobody uses is not remembered");
        // Who came when there was no limit counts when there is one.
        let early = census.enter(vec![(user.clone(), None)]).ok();
        assert_eq!(census.enter(vec![(user.clone(), Some(1))]).err(), Some(user));
        drop(early);
    }
}
