//! The HTTP side door: the status page, `/metrics`, `/healthz`, `/readyz`, `/topology`.
//!
//! Promises: GET and HEAD only; connections, header bytes and the time of a request are bounded, so that
//! a slow or greedy peer costs at most [`MAX_CONNECTIONS`] small buffers, and keeps nobody else from an answer; no answer
//! shows a secret.
//! Deliberately changes nothing. Without a token it has no login: bind it to where only operators reach it.

pub mod access;
pub mod chart;
mod guests;
pub mod history;
pub mod page;
pub mod words;

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, MissedTickBehavior};

use self::access::Access;
use self::guests::{Guests, Seat};
use self::history::History;
use self::page::View;
use crate::metrics::{ClassCacheFigures, FailoverFigures, Metrics, PoolFigure, Scrape, is_up, role_label};
use crate::topology::{Standing, Topology, TopologyHandle};

/// Connections at most; for a further one, whoever has been silent longest is closed.
pub const MAX_CONNECTIONS: usize = 32;
/// From accept to close: a scrape fits, an idle peer does not stay.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
const HEADER_TIME: Duration = Duration::from_secs(5);
const MAX_HEADER_BYTES: usize = 16 * 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Between two points of the status page's history.
const POINT_EVERY: Duration = Duration::from_secs(1);

const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";

/// What the answers are made of.
#[derive(Clone)]
pub struct AdminState {
    /// The published topology.
    pub topology: Arc<TopologyHandle>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Set once the proxy drains: it is no longer ready.
    pub draining: Arc<AtomicBool>,
    /// The pools' backends now; called once a scrape, must not block.
    pub pools: Arc<dyn Fn() -> Vec<PoolFigure> + Send + Sync>,
    /// The classification cache's figures now; called once a scrape, must not block.
    pub class_cache: Arc<dyn Fn() -> ClassCacheFigures + Send + Sync>,
    /// Where failover stands; must not block.
    pub failover: Arc<dyn Fn() -> FailoverFigures + Send + Sync>,
    /// Samples sent to each node so far; called once a scrape, must not block.
    pub samples: Arc<dyn Fn() -> Vec<u64> + Send + Sync>,
    /// How far each node's clock is from the primary's, in seconds.
    pub clock_offsets: Arc<dyn Fn() -> Vec<Option<f64>> + Send + Sync>,
    /// How long ago each node's position was last seen; must not block.
    pub sample_ages: Arc<dyn Fn() -> Vec<Option<Duration>> + Send + Sync>,
    /// What is asked for, but for /healthz and /readyz.
    pub access: Arc<Access>,
    /// What the status page shows of the last minutes.
    pub memory: Arc<Memory>,
}

/// The status page's memory, and since when it runs.
pub struct Memory {
    history: Mutex<History>,
    keep: Duration,
    begun: Instant,
    policy: HeaderValue,
}

impl Memory {
    /// Remembers `keep`; begins now.
    pub fn new(keep: Duration) -> Memory {
        let policy = HeaderValue::from_str(&page::policy()).expect("hashes and words are visible ASCII");
        Memory { history: Mutex::new(History::new(keep)), keep, begun: Instant::now(), policy }
    }

    /// A panic while it was held leaves a point or an event too few, at most.
    fn lock(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves until the future is dropped; connections then end by their own time limit.
pub async fn serve(listener: TcpListener, state: AdminState) {
    let remembering = remember(state.clone());
    tokio::select! {
        () = accept(listener, state) => {}
        () = remembering => {}
    }
}

/// One point a second; and what changes between two, when it does.
async fn remember(state: AdminState) {
    let mut tick = tokio::time::interval(POINT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        // Before the look: a change in between wakes it, too.
        let changed = state.topology.changed();
        state.memory.lock().observe(&state.topology.load(), clock());
        tokio::select! {
            _ = tick.tick() => {
                let counts = state.metrics.statements_so_far().collect();
                state.memory.lock().record(state.memory.begun.elapsed(), &state.topology.load(), counts);
            }
            () = changed => {}
        }
    }
}

fn clock() -> Duration {
    // A clock before 1970 is shown as 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

async fn accept(listener: TcpListener, state: AdminState) {
    let guests = Guests::new(MAX_CONNECTIONS);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let seat = guests.seat().await;
                tokio::spawn(connection(stream, seat, state.clone()));
            }
            Err(e) => {
                // Out of file descriptors, most likely: accepting again at once would spin.
                tracing::warn!(error = %e, "an HTTP connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, seat: Seat, state: AdminState) {
    let seat = &seat;
    let service = service_fn(move |request: Request<Incoming>| {
        let state = state.clone();
        seat.meanwhile(async move {
            let response = answer(request.method(), request.uri().path(), request.headers(), &state).await;
            Ok::<_, Infallible>(response)
        })
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    // A peer that breaks HTTP or takes too long concerns nobody else.
    tokio::select! {
        _ = tokio::time::timeout(CONNECTION_TIME, serving) => {}
        () = seat.told_to_leave() => {}
    }
}

async fn answer(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    state: &AdminState,
) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        let mut refusal = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".to_owned());
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    // Whoever starts, watches and balances proxies need not hold the token: these two say one word.
    if !["/healthz", "/readyz"].contains(&path) && !state.access.allows(headers) {
        let mut refusal =
            response(StatusCode::UNAUTHORIZED, TEXT, "a token is needed (http_token)\n".to_owned());
        for scheme in ["Bearer realm=\"highwater\"", "Basic realm=\"highwater\", charset=\"UTF-8\""] {
            refusal.headers_mut().append(WWW_AUTHENTICATE, HeaderValue::from_static(scheme));
        }
        return refusal;
    }
    match path {
        "/" => status_page(state).await,
        "/metrics" => response(StatusCode::OK, METRICS, scrape(state)),
        "/healthz" => response(StatusCode::OK, TEXT, "alive\n".to_owned()),
        "/readyz" => {
            let readiness = readiness(&state.topology.load(), state.draining.load(Ordering::Relaxed));
            response(readiness.status(), TEXT, format!("{}\n", readiness.text()))
        }
        "/topology" => response(
            StatusCode::OK,
            JSON,
            format!("{:#}\n", topology_json(&state.topology.load(), &(state.failover)())),
        ),
        _ => response(
            StatusCode::NOT_FOUND,
            TEXT,
            "here are /, /metrics, /healthz, /readyz and /topology\n".to_owned(),
        ),
    }
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn status_page(state: &AdminState) -> Response<Full<Bytes>> {
    let state = state.clone();
    let policy = state.memory.policy.clone();
    // Not on this thread, which samples the nodes: an hour of many nodes takes a while to draw.
    let drawn = tokio::task::spawn_blocking(move || {
        let memory = &state.memory;
        let history = memory.lock().clone();
        page::page(&View {
            topology: &state.topology.load(),
            failover: &(state.failover)(),
            history: &history,
            keep: memory.keep,
            draining: state.draining.load(Ordering::Relaxed),
            pools: &(state.pools)(),
            clients: state.metrics.clients.get(),
            pinned: state.metrics.pinned_sessions.get(),
            waiting: state.metrics.gate_waiting.get(),
            clock: clock(),
            uptime: memory.begun.elapsed(),
        })
    });
    let Ok(page) = drawn.await else {
        let failed = "the page could not be drawn; the log says why\n".to_owned();
        return response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, failed);
    };
    let mut response = response(StatusCode::OK, HTML, page);
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

fn scrape(state: &AdminState) -> String {
    let pools = (state.pools)();
    let class_cache = (state.class_cache)();
    state.metrics.render(&Scrape {
        topology: &state.topology.load(),
        pools: &pools,
        class_cache,
        samples: &(state.samples)(),
        clock_offsets: &(state.clock_offsets)(),
        topology_changes: state.topology.changes(),
        sample_ages: &(state.sample_ages)(),
        failover: (state.failover)(),
    })
}

/// Whether a load balancer should send clients here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// A primary is known and answers.
    Ready,
    /// No primary answers, but a replica serves reads.
    ReadOnly,
    /// Neither.
    NoNode,
    /// The proxy is going away.
    Draining,
}

impl Readiness {
    fn status(self) -> StatusCode {
        match self {
            Readiness::Ready | Readiness::ReadOnly => StatusCode::OK,
            Readiness::NoNode | Readiness::Draining => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Readiness::Ready => "ready",
            Readiness::ReadOnly => "read-only: no primary answers",
            Readiness::NoNode => "not ready: no node can serve",
            Readiness::Draining => "not ready: draining",
        }
    }
}

/// Pure: what `/readyz` says.
pub fn readiness(topology: &Topology, draining: bool) -> Readiness {
    let primary = topology.nodes.iter().any(|n| n.standing == Standing::Primary { reachable: true });
    if draining {
        Readiness::Draining
    } else if primary {
        Readiness::Ready
    } else if topology.serving_replicas().next().is_some() {
        Readiness::ReadOnly
    } else {
        Readiness::NoNode
    }
}

fn topology_json(topology: &Topology, failover: &FailoverFigures) -> serde_json::Value {
    let nodes: Vec<_> = topology
        .members()
        .map(|node| {
            let excluded = match &node.standing {
                Standing::Excluded(why) => Some(why.label()),
                _ => None,
            };
            json!({
                "name": &*node.name,
                "role": role_label(&node.standing),
                "up": is_up(&node.standing),
                "excluded": excluded,
                "weight": node.weight,
                "zone": node.zone.as_deref(),
                "timeline": node.timeline.map(|t| t.0),
                "replay_lag_bytes": node.replay_lag_bytes,
                "replay_lag_seconds": node.replay_lag.map(|l| l.as_secs_f64()),
                "replay_bytes_per_second": node.replay_rate,
                "catch_up_seconds": node.catch_up.map(|time| time.as_secs_f64()),
                "replay_paused": node.recovery.map(|r| r.paused),
                "apply_delay_seconds": node.recovery.map(|r| r.apply_delay.as_secs_f64()),
                "conflicts": node.recovery.map(|r| r.conflicts),
                "server_major": node.server_major,
            })
        })
        .collect();
    let primary = topology.primary.and_then(|id| topology.nodes.get(id.index())).map(|n| &*n.name);
    json!({
        "epoch": topology.epoch.0,
        // As text: JavaScript's numbers end at 53 bits.
        "system_identifier": topology.system_identifier.map(|s| s.to_string()),
        "primary": primary,
        "timeline": topology.timeline.map(|t| t.0),
        "failover": { "state": failover.state, "blocked": failover.blocked },
        "nodes": nodes,
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::metrics::Labels;
    use crate::metrics::tests::topology;
    use crate::topology::Exclusion;

    fn state() -> AdminState {
        let standings =
            vec![Standing::Primary { reachable: true }, Standing::Excluded(Exclusion::TooFarBehind)];
        AdminState {
            topology: Arc::new(TopologyHandle::new(topology(standings))),
            metrics: Arc::new(Metrics::new(&["n0".to_owned(), "n1".to_owned()], &Labels::default())),
            draining: Arc::new(AtomicBool::new(false)),
            pools: Arc::new(Vec::new),
            class_cache: Arc::new(ClassCacheFigures::default),
            samples: Arc::new(|| vec![7, 8]),
            clock_offsets: Arc::new(|| vec![None, Some(0.5)]),
            sample_ages: Arc::new(Vec::new),
            access: Arc::default(),
            memory: Arc::new(Memory::new(Duration::from_secs(60))),
            failover: Arc::new(FailoverFigures::default),
        }
    }

    async fn ask(address: std::net::SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn readiness_follows_the_topology() {
        let up = Standing::Primary { reachable: true };
        let down = Standing::Primary { reachable: false };
        assert_eq!(readiness(&topology(vec![up.clone()]), false), Readiness::Ready);
        assert_eq!(readiness(&topology(vec![up]), true), Readiness::Draining);
        assert_eq!(readiness(&topology(vec![down.clone(), Standing::Replica]), false), Readiness::ReadOnly);
        assert_eq!(readiness(&topology(vec![down]), false), Readiness::NoNode);
    }

    #[tokio::test]
    async fn the_pages_answer_and_the_rest_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = state();
        let draining = Arc::clone(&state.draining);
        let server = tokio::spawn(serve(listener, state));
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let metrics = ask(address, get("/metrics").as_bytes()).await;
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("highwater_epoch 2"), "{metrics}");
        let topology = ask(address, get("/topology").as_bytes()).await;
        let body: serde_json::Value =
            serde_json::from_str(topology.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!(body["primary"], "n0");
        assert_eq!(body["nodes"][1]["excluded"], "too_far_behind");
        assert!(ask(address, get("/healthz").as_bytes()).await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, get("/readyz").as_bytes()).await.ends_with("\r\n\r\nready\n"));
        draining.store(true, Ordering::Relaxed);
        assert!(ask(address, get("/readyz").as_bytes()).await.starts_with("HTTP/1.1 503"));
        assert!(ask(address, get("/nothing").as_bytes()).await.starts_with("HTTP/1.1 404"));
        let head = ask(address, b"HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
        let post = ask(
            address,
            b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
        assert!(post.await.starts_with("HTTP/1.1 405"));
        assert!(ask(address, b"\x00\x01garbage\r\n\r\n").await.starts_with("HTTP/1.1 400"));
        let huge = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(MAX_HEADER_BYTES));
        assert!(ask(address, huge.as_bytes()).await.starts_with("HTTP/1.1 431"));
        server.abort();
    }

    #[tokio::test]
    async fn with_a_token_all_but_the_two_words_ask_for_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = state();
        state.access.set(Some(&crate::config::Secret("s3cret".to_owned())));
        let server = tokio::spawn(serve(listener, state));
        for path in ["/", "/metrics", "/topology", "/nothing", "/healthz", "/readyz"] {
            let with =
                |header: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n");
            let without = ask(address, with("").as_bytes()).await;
            let wrong = ask(address, with("Authorization: Bearer guess\r\n").as_bytes()).await;
            let right = ask(address, with("Authorization: Bearer s3cret\r\n").as_bytes()).await;
            let open = ["/healthz", "/readyz"].contains(&path);
            assert_eq!(without.starts_with("HTTP/1.1 401"), !open, "{without}");
            assert_eq!(wrong.starts_with("HTTP/1.1 401"), !open, "{wrong}");
            assert_eq!(without.contains("www-authenticate: Basic"), !open, "{without}");
            assert!(!right.starts_with("HTTP/1.1 401") && !(without + &right).contains("s3cret"));
        }
        server.abort();
    }

    #[tokio::test]
    async fn the_status_page_answers_under_a_strict_policy() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, state()));
        let page = ask(address, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        let (head, body) = page.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/html"), "{head}");
        assert!(head.contains("content-security-policy: default-src 'none'; style-src 'sha256-"), "{head}");
        assert!(body.contains("n0 is the primary") && body.contains("its lag is above max_lag"), "{body}");
        server.abort();
    }

    /// Resolves when the peer has closed; what it said.
    async fn closed(mut stream: TcpStream) -> String {
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said).await;
        String::from_utf8_lossy(&said).into_owned()
    }

    // The clock is paused: it moves on to the next timer once every task waits, so the limits pass
    // without anybody waiting for them, and a limit that is not set would hang the test.
    #[tokio::test(start_paused = true)]
    async fn slow_headers_and_idle_connections_are_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, state()));
        let begun = tokio::time::Instant::now();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET /metrics HTTP/1.1\r\nX-Slow: ").await.unwrap();
        assert!(!closed(slow).await.contains("200"));
        assert!(begun.elapsed() <= HEADER_TIME + Duration::from_secs(1), "{:?}", begun.elapsed());
        let begun = tokio::time::Instant::now();
        let mut kept = TcpStream::connect(address).await.unwrap();
        kept.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert!(closed(kept).await.contains("alive"));
        assert!(begun.elapsed() <= CONNECTION_TIME + Duration::from_secs(1), "{:?}", begun.elapsed());
        server.abort();
    }

    #[tokio::test]
    async fn one_connection_more_than_the_limit_has_the_place_of_the_one_silent_longest() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, state()));
        let request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
        let mut held = std::collections::VecDeque::new();
        for _ in 0..MAX_CONNECTIONS {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request).await.unwrap();
            let mut first = [0];
            stream.read_exact(&mut first).await.unwrap();
            held.push_back(stream);
        }
        let mut more = TcpStream::connect(address).await.unwrap();
        more.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        more.read_to_end(&mut answer).await.unwrap();
        assert!(String::from_utf8_lossy(&answer).contains("alive"));
        let mut silent = held.pop_front().unwrap();
        silent.read_to_end(&mut answer).await.unwrap();
        // The others are served on.
        for mut stream in held {
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
            answer.clear();
            stream.read_to_end(&mut answer).await.unwrap();
            assert_eq!(String::from_utf8_lossy(&answer).matches("alive").count(), 2);
        }
        server.abort();
    }
}
