//! Accepts clients, counts and limits them, hands each to a worker, and drains them at the end.
//!
//! Each worker is a thread with a runtime of its own; a session never leaves its worker, so that its
//! reads, writes and wake-ups stay on one core. Accepting happens on one thread, which deals clients
//! out to the workers in turn.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::backend::StartupParameters;
use crate::client::auth::{self, AuthFailure};
use crate::client::startup::{self, GreetError, Greeting};
use crate::client::verifiers::Verifiers;
use crate::net::{self, ClientTls};
use crate::session::handle::{CancelOutcome, Ending};
use crate::session::{Arrival, Session, Shared};
use crate::wire::ErrorReport;

/// Accepted clients on their way to one worker.
const HANDOVER: usize = 1024;

/// Why connections are refused before their login, as the metric labels it.
pub const REFUSED_LABELS: [&str; 7] =
    ["timeout", "tls", "gone", "protocol", "draining", "too_many", "replication"];

/// What becomes of cancel requests, as the metric labels it.
pub const CANCEL_LABELS: [&str; 4] = ["nothing", "while_waiting", "forwarded", "failed"];

/// What it takes to turn a connection into a session.
pub struct Door {
    /// What sessions share.
    pub shared: Arc<Shared>,
    /// TLS towards clients.
    pub tls: ClientTls,
    /// Who may log in.
    pub verifiers: Verifiers,
    /// Counts clients and ends them.
    pub drain: Arc<Drain>,
}

/// How many clients there are, and whether new ones are welcome.
#[derive(Default)]
pub struct Drain {
    clients: AtomicUsize,
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

    fn enter(self: &Arc<Drain>) -> Present {
        self.clients.fetch_add(1, Ordering::SeqCst);
        Present(self.clone())
    }

    /// No new clients; those who are there end when they are idle, and at `deadline` in any case.
    pub async fn drain(&self, shared: &Shared, deadline: Instant) {
        self.draining.store(true, Ordering::SeqCst);
        shared.sessions.end_all(Ending::WhenIdle);
        if !self.empty_by(deadline).await {
            warn!(clients = self.clients(), "drain_timeout has passed: ending the sessions that are left");
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
struct Present(Arc<Drain>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::SeqCst);
        self.0.gone.notify_waiters();
    }
}

/// One worker's end of the handover.
pub type Handover = mpsc::Receiver<std::net::TcpStream>;

/// The workers' ends, to be given to as many threads, and the acceptor's.
pub fn handover(workers: usize) -> (Vec<mpsc::Sender<std::net::TcpStream>>, Vec<Handover>) {
    (0..workers).map(|_| mpsc::channel(HANDOVER)).unzip()
}

/// Accepts for ever, and deals clients out to the workers in turn.
pub async fn accept(listener: TcpListener, workers: Vec<mpsc::Sender<std::net::TcpStream>>) {
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
        if workers[next].send(tcp).await.is_err() {
            return;
        }
    }
}

/// One worker: serves the clients it is handed, each as a task of its own.
pub async fn work(door: Arc<Door>, mut handed: Handover, worker: usize) {
    while let Some(tcp) = handed.recv().await {
        match TcpStream::from_std(tcp) {
            Ok(tcp) => {
                let door = door.clone();
                tokio::spawn(async move { door.serve(tcp, worker).await });
            }
            Err(error) => warn!(%error, "could not take over a client"),
        }
    }
}

impl Door {
    async fn serve(self: Arc<Door>, tcp: TcpStream, worker: usize) {
        let peer = tcp.peer_addr().ok();
        let present = self.drain.enter();
        self.shared.metrics.clients.inc();
        self.shared.metrics.clients_total.inc();
        self.serve_counted(tcp, peer, worker).await;
        self.shared.metrics.clients.dec();
        drop(present);
    }

    async fn serve_counted(&self, tcp: TcpStream, peer: Option<SocketAddr>, worker: usize) {
        let metrics = &self.shared.metrics;
        let deadline = Instant::now() + self.shared.config.auth.login_timeout;
        if let Err(error) = net::set_client_options(&tcp) {
            debug!(%error, "could not set socket options");
        }
        let mut connection = match startup::greet(tcp, &self.tls, deadline).await {
            Ok(Greeting::Login(connection)) => connection,
            Ok(Greeting::Cancel { pid, key, connection }) => {
                self.cancel(pid, &key).await;
                // Only now: who asked takes the end of the connection for the end of the matter.
                drop(connection);
                return;
            }
            Ok(Greeting::Gone) => return,
            Err(error) => {
                metrics.client_refused.inc(match error {
                    GreetError::Timeout => "timeout",
                    GreetError::Tls(_) => "tls",
                    GreetError::Io(_) => "gone",
                    GreetError::Nonsense(_) | GreetError::Refused(_) => "protocol",
                });
                debug!(?peer, %error, "client refused before its login");
                return;
            }
        };
        if self.drain.is_draining() {
            metrics.client_refused.inc("draining");
            let report = ErrorReport::fatal("57P03", "the database system is shutting down");
            return say_last(&mut connection.stream, &report).await;
        }
        if self.drain.clients() > self.shared.config.max_clients {
            metrics.client_refused.inc("too_many");
            let report = ErrorReport::fatal("53300", "sorry, too many clients already");
            return say_last(&mut connection.stream, &report).await;
        }
        if connection.startup.replication.is_some() {
            metrics.client_refused.inc("replication");
            let report =
                ErrorReport::fatal("0A000", "replication connections are not supported by highwater")
                    .hint("Connect to the node itself.");
            return say_last(&mut connection.stream, &report).await;
        }
        let keys = match auth::authenticate(&mut connection, &self.verifiers, deadline).await {
            Ok(keys) => keys,
            Err(failure) => {
                match &failure {
                    AuthFailure::NoVerifier(error) => warn!(?peer, %error, "nobody can say who may log in"),
                    AuthFailure::Gone => {}
                    other => info!(?peer, user = connection.startup.user, error = %other, "login failed"),
                }
                metrics.login_failures.inc(failure.label());
                return;
            }
        };
        let startup = connection.startup;
        let mut parameters = startup.parameters;
        parameters.sort();
        let arrival = Arrival {
            stream: connection.stream,
            user: startup.user,
            database: startup.database,
            startup: StartupParameters(parameters),
            minor: startup.minor,
            keys,
        };
        Session::run(self.shared.clone(), arrival, worker).await;
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
