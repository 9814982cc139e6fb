//! This proxy among several: its lease in etcd, whether it leads, and what the others say.
//!
//! Runs on a thread of its own, so that a busy control loop or worker never delays a sign of life.
//!
//! Promises: the gate's lease is never longer than what etcd has confirmed ([`lease::until`]), and is extended only by
//! whoever has read all keys after that; a write is on etcd when [`Coordination::write`] returns `Ok`, and when that
//! cannot be learned in time the leadership is given up before anything else is done, so that what a leader has in
//! memory is what etcd has; nothing is opened again before `control` has seen what happened meanwhile
//! ([`Gate::resume`]). Deliberately does not know what the record says.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle};
use tokio::sync::{Notify, oneshot, watch};

use crate::config::coordination::CoordinationConfig;
use crate::etcd::{Change, Compare, Etcd, EtcdError, LeaseId};
use crate::failover::lease::{self, Close, Kept, Keys, Said, Step, View};
use crate::gate::{Gate, boottime};

/// A sign of life is sent so many times in the term of a lease.
const SIGNS: u32 = 8;
/// While something is waited for, etcd is asked so often at least.
const EAGER: Duration = Duration::from_millis(20);
/// A write is tried for so many times `timeout`.
const TRIES: u32 = 3;
/// Who is waited for is logged after this.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the control loop goes by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The lease holds, and what follows is of after its last confirmation.
    pub valid: bool,
    /// For [`Gate::resume`].
    pub lapses: u64,
    /// Whether etcd has answered when it was asked last.
    pub up: bool,
    /// This proxy leads.
    pub term: Option<Arc<Term>>,
    /// Who does.
    pub leader: Option<String>,
    /// The record; `None`: there is none yet.
    pub record: Option<Kept>,
    /// The leader's last word to close.
    pub close: Option<Close>,
    /// All proxies that are there, by name.
    pub proxies: Vec<String>,
}

/// A time during which this proxy leads: what it began with.
#[derive(Debug, PartialEq, Eq)]
pub struct Term {
    /// Counted in this process, from 1.
    pub number: u64,
    /// The revision that made this proxy the leader.
    pub token: u64,
    /// The record.
    pub record: Option<Kept>,
    /// How standbys were configured that have been cut off.
    pub upstreams: Vec<(String, String)>,
}

/// Whether orders may be given in a term: asked before each.
#[derive(Clone)]
pub struct Leave {
    shared: Arc<Shared>,
    term: u64,
}

impl Leave {
    /// By the lease, at this moment: nobody else has led, or leads.
    pub fn is_given(&self) -> bool {
        self.shared.leading.load(Ordering::SeqCst) == self.term && self.shared.gate.holds_lease()
    }

    /// Sets a key of the leader's, or removes it; on etcd when this returns. Blocks its thread meanwhile.
    pub fn write(&self, key: &str, value: Option<String>) -> Result<u64, String> {
        Shared::write(&self.shared, self.term, key.to_owned(), value)
    }

    /// The key that keeps how `node` was configured.
    pub fn upstream(&self, node: &str) -> String {
        self.shared.keys.upstream(node)
    }
}

/// This proxy among several. Dropping it ends its thread, and its lease if no session has a connection any more.
pub struct Coordination {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and those who ask it share.
struct Shared {
    config: CoordinationConfig,
    keys: Keys,
    /// May this one lead at all?
    eligible: bool,
    asks: Etcd,
    writes: Etcd,
    runtime: Handle,
    gate: Arc<Gate>,
    /// The number of the term; 0: it does not lead.
    leading: AtomicU64,
    state: Mutex<State>,
    seen: watch::Sender<Arc<Seen>>,
    /// To ask etcd at once.
    bell: Notify,
    stop: Notify,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    terms: u64,
    term: Option<Running>,
    /// The token of a leadership that may still be in etcd, and is to be ended.
    resign: Option<u64>,
    /// It cannot lead: why was logged.
    withdrawn: bool,
    said: Said,
    waits: Vec<Wait>,
    seen: Seen,
}

/// A lease.
#[derive(Clone)]
struct Held {
    id: LeaseId,
    /// As etcd has granted it, and as it was asked for: the shorter one.
    ttl: Duration,
    /// `NAME/LEASE`.
    proxy: String,
    key: String,
    /// When the last confirmed sign of life was sent.
    sent: Duration,
    /// What is under the key.
    said: Said,
}

struct Running {
    term: Arc<Term>,
    /// Which revision wrote each of the leader's keys.
    revisions: Arc<tokio::sync::Mutex<HashMap<String, u64>>>,
}

/// Somebody waits for all proxies.
struct Wait {
    step: Step,
    since: Instant,
    told: bool,
    done: oneshot::Sender<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Coordination {
    /// Begins; the gate must be a leased one. `eligible`: it may lead. `Err`: a file cannot be read, or no thread made.
    pub fn start(
        config: &CoordinationConfig,
        gate: &Arc<Gate>,
        eligible: bool,
    ) -> Result<(Coordination, watch::Receiver<Arc<Seen>>), String> {
        let client = || Etcd::new(config).map_err(|error| error.to_string());
        let (asks, writes) = (client()?, client()?);
        let runtime =
            Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
        let (seen, sees) = watch::channel(Arc::new(Seen::default()));
        let shared = Arc::new(Shared {
            config: config.clone(),
            keys: Keys::new(&config.prefix),
            eligible,
            asks,
            writes,
            runtime: runtime.handle().clone(),
            gate: Arc::clone(gate),
            leading: AtomicU64::new(0),
            state: Mutex::default(),
            seen,
            bell: Notify::new(),
            stop: Notify::new(),
        });
        let running = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("hw-etcd".to_owned()).spawn(move || {
            runtime.block_on(running.run());
            runtime.shutdown_timeout(Duration::from_millis(200));
        });
        let thread = thread.map_err(|error| error.to_string())?;
        Ok((Coordination { shared, thread: Some(thread) }, sees))
    }

    /// This proxy's name.
    pub fn name(&self) -> &str {
        &self.shared.config.name
    }

    /// The leave of a term.
    pub fn leave(&self, term: u64) -> Leave {
        Leave { shared: Arc::clone(&self.shared), term }
    }

    /// Replaces the record; on etcd when this returns. Blocks meanwhile.
    pub fn write(&self, term: u64, attempt: Option<&str>, record: &str) -> Result<(), String> {
        let key = self.shared.keys.record();
        Shared::write(&self.shared, term, key, Some(Kept::value(attempt, record))).map(drop)
    }

    /// Tells all proxies to close their connections to the old primary; resolves to `Ok` when nobody is left who has
    /// not, or cannot have any.
    pub fn close(&self, term: u64, attempt: String) -> impl Future<Output = Result<(), ()>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move {
            let (tell, told) = oneshot::channel();
            let writes = Arc::clone(&shared);
            let key = shared.keys.close();
            shared.runtime.spawn(async move {
                let _ = tell.send(writes.durable(term, key, Some(attempt)).await);
            });
            let revision = told.await.map_err(drop)?.map_err(drop)?;
            shared.wait(term, Step::Closed(revision)).await
        }
    }

    /// Resolves to `Ok` when nobody is in a transaction on the primary any more at the other proxies.
    pub fn drained(&self, term: u64, attempt: String) -> impl Future<Output = Result<(), ()>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move { shared.wait(term, Step::Drained(attempt)).await }
    }

    /// Where [`say`](Speaker::drained) goes.
    pub fn speaker(&self) -> Speaker {
        Speaker(Arc::clone(&self.shared))
    }

    /// It cannot lead, as the record cannot be used.
    pub fn withdraw(&self, term: u64) {
        lock(&self.shared.state).withdrawn = true;
        self.shared.resign(term, "the record in etcd cannot be used");
    }

    /// What has been seen may be acted on again.
    pub fn resume(&self, seen: &Seen) {
        if seen.valid {
            self.shared.gate.resume(seen.lapses);
        }
    }
}

impl Drop for Coordination {
    fn drop(&mut self) {
        self.shared.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// Acknowledges what the leader has asked for.
#[derive(Clone)]
pub struct Speaker(Arc<Shared>);

impl Speaker {
    /// Nobody is in a transaction on the primary any more, in this attempt.
    pub fn drained(&self, attempt: String) {
        lock(&self.0.state).said.drained = Some(attempt);
        self.0.bell.notify_one();
    }

    /// Whether any node answers this proxy.
    pub fn reaches(&self, any: bool) {
        lock(&self.0.state).said.away = !any;
    }

    /// The word to close of this revision was followed: no connection to the old primary is left.
    pub fn closed(&self, revision: u64) {
        let mut state = lock(&self.0.state);
        state.said.closed = state.said.closed.max(revision);
        self.0.bell.notify_one();
    }
}

impl Shared {
    async fn run(self: Arc<Shared>) {
        let watcher = Arc::clone(&self);
        let watching = tokio::spawn(async move { watcher.watch_lease().await });
        let mut last_error: Option<String> = None;
        loop {
            match self.ask().await {
                Ok(()) => {
                    if last_error.take().is_some() {
                        tracing::info!("coordination: etcd answers again");
                    }
                }
                Err(error) => {
                    let text = error.to_string();
                    self.publish(|seen| seen.up = false);
                    if last_error.as_ref() != Some(&text) {
                        tracing::warn!(error = text, "coordination: etcd does not answer");
                        last_error = Some(text);
                    }
                }
            }
            let pause = match lock(&self.state).waits.is_empty() {
                true => self.config.interval,
                false => self.config.interval.min(EAGER),
            };
            tokio::select! {
                () = self.stop.notified() => break,
                () = self.bell.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        watching.abort();
        // Whoever leads next need not wait for its end; but nobody may take it for ended while something of the primary
        // could still be passed on.
        let held = lock(&self.state).held.clone();
        if let Some(held) = held.filter(|_| self.gate.sockets_open() == 0) {
            self.gate.lapse();
            let _ = self.asks.revoke(held.id).await;
        }
    }

    /// Closes the gate when the lease ends, whatever the rest of this thread waits for.
    async fn watch_lease(&self) {
        loop {
            tokio::time::sleep(EAGER).await;
            if !self.gate.holds_lease() && !self.gate.is_lapsed() {
                self.lapse("etcd has confirmed no sign of life in time");
            }
        }
    }

    /// One round: a sign of life if it is time, what is to be said, and all keys.
    async fn ask(&self) -> Result<(), EtcdError> {
        let known = lock(&self.state).held.clone();
        let mut held = match known {
            Some(held) => held,
            None => self.join().await?,
        };
        let resign = lock(&self.state).resign;
        if let Some(token) = resign {
            let (holds, change) =
                (Compare::Created(self.keys.leader(), token), Change::Delete(self.keys.leader()));
            self.asks.transaction(&[holds], &[change], &self.keys.leader()).await?;
            lock(&self.state).resign = None;
        }
        let sent = boottime();
        if sent >= held.sent + held.ttl / SIGNS {
            match self.asks.keep_alive(held.id).await? {
                Some(ttl) => {
                    held.ttl = held.ttl.min(Duration::from_secs(ttl));
                    held.sent = sent;
                }
                None => {
                    self.lose("its lease has ended in etcd");
                    return Ok(());
                }
            }
        }
        let said = lock(&self.state).said.clone();
        if said != held.said {
            let put = Change::Put(held.key.clone(), said.value(), Some(held.id));
            self.asks.transaction(&[], &[put], &held.key).await?;
            held.said = said;
        }
        let entries = self.asks.range(self.keys.prefix()).await?;
        match View::read(&self.keys, &entries) {
            Ok(view) => self.take(view, held).await,
            Err(why) => {
                self.lapse(&why);
                Ok(())
            }
        }
    }

    async fn join(&self) -> Result<Held, EtcdError> {
        let sent = boottime();
        let (id, ttl) = self.asks.grant(self.config.ttl).await?;
        let proxy = format!("{}/{id}", self.config.name);
        let key = self.keys.proxy(&self.config.name, &id.to_string());
        let said = lock(&self.state).said.clone();
        let put = Change::Put(key.clone(), said.value(), Some(id));
        self.asks.transaction(&[], &[put], &key).await?;
        let ttl = self.config.ttl.min(Duration::from_secs(ttl));
        tracing::info!(name = self.config.name, lease = %id, "coordination: joined");
        let held = Held { id, ttl, proxy, key, sent, said };
        lock(&self.state).held = Some(held.clone());
        Ok(held)
    }

    /// All keys were read, after a sign of life was confirmed.
    async fn take(&self, mut view: View, held: Held) -> Result<(), EtcdError> {
        if !view.peers.iter().any(|peer| peer.proxy == held.proxy) {
            self.lose("its key is not in etcd any more");
            return Ok(());
        }
        let (term, away) = {
            let state = lock(&self.state);
            let term = state.term.as_ref().map(|running| running.term.number);
            (term, lease::yields(&held.proxy, &state.said, &view.peers))
        };
        if let Some(term) = term.filter(|_| away) {
            self.resign(term, "no node answers this proxy, and others are answered: one of them is to lead");
            return Ok(());
        }
        if !away && self.may_claim(&view, &held) {
            let put = Change::Put(self.keys.leader(), held.proxy.clone(), Some(held.id));
            let free = Compare::Created(self.keys.leader(), 0);
            let done = self.asks.transaction(&[free], &[put], self.keys.prefix()).await?;
            match View::read(&self.keys, &done.after) {
                Ok(after) => view = after,
                Err(why) => {
                    self.lapse(&why);
                    return Ok(());
                }
            }
            if done.done {
                self.lead(&view, done.after.entries.iter().map(|e| (e.key.clone(), e.modified)).collect());
            }
        }
        let mut state = lock(&self.state);
        // An answer that was lost may have made it the leader: what it does not know of it cannot use.
        let ours =
            view.leader.as_ref().filter(|leader| leader.proxy == held.proxy).map(|leader| leader.token);
        let token = state.term.as_ref().map(|running| running.term.token);
        if token.is_some() && token != ours {
            drop(state);
            self.lapse("it is not the leader any more");
            return Ok(());
        }
        if token.is_none() && ours.is_some() {
            state.resign = ours;
        }
        // A lapse while etcd was being asked counts as one of before: the next round resumes.
        let lapses = self.gate.lapses();
        let margin = self.config.margin().max(held.ttl / 10);
        self.gate.lease(lease::until(held.sent, held.ttl, margin));
        state.waits.retain(|wait| !wait.done.is_closed());
        for wait in std::mem::take(&mut state.waits) {
            if view.is_done(&held.proxy, &wait.step) {
                let _ = wait.done.send(());
                continue;
            }
            let late = !wait.told && wait.since.elapsed() >= PATIENCE;
            if late {
                let missing = view.missing(&held.proxy, &wait.step);
                tracing::warn!(?missing, step = ?wait.step, "coordination: other proxies are waited for");
            }
            state.waits.push(Wait { told: wait.told || late, ..wait });
        }
        let seen = Seen {
            valid: state.resign.is_none() && self.gate.holds_lease(),
            lapses,
            up: true,
            term: state.term.as_ref().map(|running| Arc::clone(&running.term)),
            leader: view.leader.as_ref().map(|leader| leader.name().to_owned()),
            proxies: view.peers.iter().map(|peer| peer.proxy.clone()).collect(),
            record: view.record,
            close: view.close,
        };
        state.held = Some(held);
        self.show(&mut state, seen);
        Ok(())
    }

    fn may_claim(&self, view: &View, held: &Held) -> bool {
        let state = lock(&self.state);
        let idle = state.term.is_none() && state.resign.is_none() && !state.withdrawn;
        // With a good part of the lease before it.
        let fresh = boottime() < held.sent + held.ttl / 2;
        self.eligible && idle && view.leader.is_none() && fresh
    }

    fn lead(&self, view: &View, revisions: HashMap<String, u64>) {
        let mut state = lock(&self.state);
        state.terms += 1;
        let term = Arc::new(Term {
            number: state.terms,
            token: view.leader.as_ref().map_or(0, |leader| leader.token),
            record: view.record.clone(),
            upstreams: view.upstreams.clone(),
        });
        self.leading.store(term.number, Ordering::SeqCst);
        tracing::info!(name = self.config.name, token = term.token, "coordination: this proxy leads");
        let revisions = Arc::new(tokio::sync::Mutex::new(revisions));
        state.term = Some(Running { term, revisions });
    }

    /// The lease is gone.
    fn lose(&self, why: &str) {
        lock(&self.state).held = None;
        self.lapse(why);
    }

    /// Writes stop, and nothing of the primary is passed on any more; leadership, if there was one, is over.
    fn lapse(&self, why: &str) {
        let mut state = lock(&self.state);
        self.leading.store(0, Ordering::SeqCst);
        // Also where it is closed already: it may be about to be opened by what was seen before this.
        let told = self.gate.is_lapsed() && state.term.is_none();
        self.gate.lapse();
        let led = state.term.take();
        if let Some(running) = &led {
            state.resign = Some(running.term.token);
        }
        state.waits.clear();
        if !told {
            tracing::error!(why, led = led.is_some(), "coordination: writes stop");
        }
        let lapses = self.gate.lapses();
        let up = state.seen.up;
        let seen = Seen { valid: false, lapses, term: None, up, ..state.seen.clone() };
        self.show(&mut state, seen);
    }

    fn resign(&self, term: u64, why: &str) {
        if self.leading.load(Ordering::SeqCst) == term {
            self.lapse(why);
            self.bell.notify_one();
        }
    }

    fn publish(&self, change: impl FnOnce(&mut Seen)) {
        let mut state = lock(&self.state);
        let mut seen = state.seen.clone();
        change(&mut seen);
        self.show(&mut state, seen);
    }

    fn show(&self, state: &mut State, seen: Seen) {
        if seen == state.seen {
            return;
        }
        if seen.leader != state.seen.leader {
            tracing::info!(leader = seen.leader.as_deref().unwrap_or("none"), "coordination: leader");
        }
        state.seen = seen.clone();
        self.seen.send_replace(Arc::new(seen));
    }

    async fn wait(&self, term: u64, step: Step) -> Result<(), ()> {
        let (done, waits) = oneshot::channel();
        {
            let mut state = lock(&self.state);
            if self.leading.load(Ordering::SeqCst) != term {
                return Err(());
            }
            state.waits.push(Wait { step, since: Instant::now(), told: false, done });
        }
        self.bell.notify_one();
        waits.await.map_err(drop)
    }

    fn write(shared: &Arc<Shared>, term: u64, key: String, value: Option<String>) -> Result<u64, String> {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let writes = Arc::clone(shared);
        shared.runtime.spawn(async move {
            let _ = tell.send(writes.durable(term, key, value).await);
        });
        // Longer than it can take: it ends by itself.
        let patience = shared.config.timeout * (TRIES + 2);
        told.recv_timeout(patience).unwrap_or_else(|_| {
            shared.resign(term, "a write to etcd did not end");
            Err("etcd did not answer in time".to_owned())
        })
    }

    /// On etcd when this returns `Ok`; else the term is over. Later writes come after this one.
    async fn durable(&self, term: u64, key: String, value: Option<String>) -> Result<u64, String> {
        let done = self.try_durable(term, &key, value).await;
        if let Err(why) = &done {
            self.resign(term, why);
        }
        done
    }

    async fn try_durable(&self, term: u64, key: &str, value: Option<String>) -> Result<u64, String> {
        let over = || "this proxy does not lead any more".to_owned();
        let running = {
            let state = lock(&self.state);
            let running = state.term.as_ref().filter(|running| running.term.number == term);
            running.map(|running| (running.term.token, Arc::clone(&running.revisions)))
        };
        let (token, revisions) = running.ok_or_else(over)?;
        let mut revisions = revisions.lock().await;
        let before = revisions.get(key).copied().unwrap_or(0);
        let leads = Compare::Created(self.keys.leader(), token);
        let unchanged = Compare::Modified(key.to_owned(), before);
        let change = match &value {
            Some(value) => Change::Put(key.to_owned(), value.clone(), None),
            None => Change::Delete(key.to_owned()),
        };
        let until = Instant::now() + self.config.timeout * TRIES;
        let mut unsure = false;
        let (revision, exists) = loop {
            if self.leading.load(Ordering::SeqCst) != term || !self.gate.holds_lease() {
                return Err(over());
            }
            let holds = [leads.clone(), unchanged.clone()];
            match self.writes.transaction(&holds, std::slice::from_ref(&change), key).await {
                Ok(done) if done.done => break (done.after.revision, value.is_some()),
                // Somebody else has written it, or an attempt of just now whose answer was lost.
                Ok(_) if unsure => {
                    match self.writes.transaction(std::slice::from_ref(&leads), &[], key).await {
                        Ok(found) if found.done => {
                            let entry = found.after.entries.into_iter().find(|entry| entry.key == key);
                            match (entry, &value) {
                                (Some(entry), Some(value)) if entry.value == *value => {
                                    break (entry.modified, true);
                                }
                                (None, None) => break (found.after.revision, false),
                                _ => return Err(format!("the key {key} was changed by somebody else")),
                            }
                        }
                        Ok(_) => return Err(over()),
                        Err(_) if Instant::now() < until => {}
                        Err(error) => return Err(error.to_string()),
                    }
                }
                Ok(_) => return Err(over()),
                Err(error) if Instant::now() >= until => return Err(error.to_string()),
                Err(_) => unsure = true,
            }
            tokio::time::sleep(EAGER).await;
        };
        // A key that was removed has no revision.
        revisions.insert(key.to_owned(), if exists { revision } else { 0 });
        Ok(revision)
    }
}
