//! The gate before the primary: whether new work may go there, who is there now, and which connections to a node still
//! stand. The way of the cluster sets it, the way of the statements passes it, and each waits for the other here.
//!
//! Promises: while it is not open, nobody enters, and who has entered is counted until they leave; when
//! [`Gate::sockets_closed`] says so, none of the connections that were told to close is there any more, so that nothing
//! a node still says can reach a client; those who wait are let in in the order in which they came. Open, it costs a
//! session two additions to a counter of its own thread, and a connection one load.
//!
//! Where several proxies share the cluster, a gate is *leased* ([`Gate::leased`]): it is closed, whatever was wanted of
//! it, unless this proxy is known to be heard of by the others, and from the moment that the lease ends no connection
//! to the primary passes anything on, by the clock and not by whoever may be late to close it.
//!
//! Deliberately not here: what a client is told, and when the gate is to be opened or closed.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, oneshot};

use crate::topology::NodeId;

/// Whether new work may go to the primary. Reads on replicas never ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Posture {
    /// It may.
    #[default]
    Open,
    /// New work waits; what is there goes on. Something may be wrong with the primary.
    Paused,
    /// The same, and somebody waits for those who are there to leave ([`Gate::drained`]): a switchover.
    Draining,
    /// New work waits, and a node whose connections were told to close gets no new ones.
    Closed,
}

impl Posture {
    /// One word for a log line or a metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Posture::Open => "open",
            Posture::Paused => "paused",
            Posture::Draining => "draining",
            Posture::Closed => "closed",
        }
    }

    fn from_byte(byte: u8) -> Posture {
        match byte {
            0 => Posture::Open,
            1 => Posture::Paused,
            2 => Posture::Draining,
            _ => Posture::Closed,
        }
    }
}

/// What all parts of a gate look at.
#[derive(Debug, Default)]
struct Signal {
    posture: AtomicU8,
    /// The posture has changed, or somebody has left who was waited for.
    changed: Notify,
    lease: Lease,
}

/// Until when this proxy may use the primary. Only a leased gate looks.
#[derive(Debug, Default)]
struct Lease {
    /// By [`boottime`].
    until_ms: AtomicU64,
    /// One more than the node that it is about; 0: none.
    primary: AtomicUsize,
}

impl Lease {
    fn is_over(&self) -> bool {
        millis(boottime()) >= self.until_ms.load(Ordering::SeqCst)
    }

    fn is_about(&self, node: NodeId) -> bool {
        self.primary.load(Ordering::SeqCst) == node.index() + 1
    }
}

/// Time that goes on while the machine is suspended, since its start.
pub fn boottime() -> Duration {
    // It cannot fail for a clock that there is; a lease would be over.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::MAX, Duration::from)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Signal {
    fn posture(&self) -> Posture {
        // In one order with the counting of those who enter: see `Presence::enter`.
        Posture::from_byte(self.posture.load(Ordering::SeqCst))
    }
}

/// The sessions of one worker that are on the primary; on a cache line of its own, so that workers do not meet.
#[derive(Debug)]
#[repr(align(64))]
struct Shard {
    here: AtomicUsize,
    signal: Arc<Signal>,
}

/// The gate. One for the whole proxy.
#[derive(Debug)]
pub struct Gate {
    signal: Arc<Signal>,
    shards: Box<[Arc<Shard>]>,
    line: Mutex<VecDeque<oneshot::Sender<()>>>,
    /// Sessions that may wait at once.
    most_waiting: AtomicUsize,
    nodes: Box<[Mutex<NodeSockets>]>,
    /// How often connections were told to close.
    closings: AtomicU64,
    wanted: Mutex<Wanted>,
    leased: bool,
}

/// What the posture comes from.
#[derive(Debug, Default)]
struct Wanted {
    posture: Posture,
    /// The lease has ended, or there has been none yet: closed.
    lapsed: bool,
    /// How often.
    lapses: u64,
}

/// The connections to one node.
#[derive(Debug)]
struct NodeSockets {
    current: Arc<Sockets>,
    /// Those that were told to close and of which some may still be there.
    closing: Vec<Arc<Sockets>>,
    /// No new ones until the gate is opened.
    shut: bool,
}

/// Connections that will be told to close together.
#[derive(Debug)]
struct Sockets {
    closed: AtomicBool,
    told: Notify,
    open: AtomicUsize,
    /// The node, where the gate is leased.
    leased: Option<NodeId>,
    signal: Arc<Signal>,
}

impl Sockets {
    fn new(signal: &Arc<Signal>, leased: Option<NodeId>) -> Arc<Sockets> {
        Arc::new(Sockets {
            closed: AtomicBool::new(false),
            told: Notify::new(),
            open: AtomicUsize::new(0),
            leased,
            signal: signal.clone(),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// Open. `most_waiting`: sessions that may wait at once.
    pub fn new(nodes: usize, workers: usize, most_waiting: usize) -> Gate {
        Gate::with(nodes, workers, most_waiting, false)
    }

    /// Closed until [`lease`](Self::lease) and [`resume`](Self::resume).
    pub fn leased(nodes: usize, workers: usize, most_waiting: usize) -> Gate {
        let gate = Gate::with(nodes, workers, most_waiting, true);
        lock(&gate.wanted).lapsed = true;
        gate.apply(Posture::Closed);
        gate
    }

    fn with(nodes: usize, workers: usize, most_waiting: usize, leased: bool) -> Gate {
        let signal = Arc::new(Signal::default());
        let shard = || Arc::new(Shard { here: AtomicUsize::new(0), signal: signal.clone() });
        let sockets = |node: u16| {
            let current = Sockets::new(&signal, leased.then_some(NodeId(node)));
            Mutex::new(NodeSockets { current, closing: Vec::new(), shut: false })
        };
        Gate {
            shards: (0..workers.max(1)).map(|_| shard()).collect(),
            line: Mutex::default(),
            most_waiting: AtomicUsize::new(most_waiting),
            nodes: (0u16..).take(nodes).map(sockets).collect(),
            closings: AtomicU64::new(0),
            wanted: Mutex::default(),
            leased,
            signal,
        }
    }

    // For the way of the cluster.

    /// Opens or closes. Opened, it lets in who waits, the first first. Without a lease it is closed all the same.
    pub fn set(&self, posture: Posture) {
        let mut wanted = lock(&self.wanted);
        wanted.posture = posture;
        self.apply(if wanted.lapsed { Posture::Closed } else { posture });
    }

    /// The primary that the lease is about: from when on it ends, nothing of it is passed on.
    pub fn leads_to(&self, primary: Option<NodeId>) {
        let primary = primary.map_or(0, |primary| primary.index() + 1);
        self.signal.lease.primary.store(primary, Ordering::SeqCst);
    }

    /// The lease lasts until then, by [`boottime`]. It opens nothing.
    pub fn lease(&self, until: Duration) {
        self.signal.lease.until_ms.store(millis(until), Ordering::SeqCst);
    }

    /// Whether the lease lasts; of a gate that is not leased, always.
    pub fn holds_lease(&self) -> bool {
        !self.leased || !self.signal.lease.is_over()
    }

    /// Nothing may go to the primary, or come from it, until [`resume`](Self::resume).
    pub fn lapse(&self) {
        {
            let mut wanted = lock(&self.wanted);
            wanted.lapsed = true;
            wanted.lapses += 1;
            self.apply(Posture::Closed);
        }
        if let Some(node) = self.signal.lease.primary.load(Ordering::SeqCst).checked_sub(1) {
            self.close_sockets(NodeId(u16::try_from(node).unwrap_or(u16::MAX)));
        }
    }

    /// How often that was.
    pub fn lapses(&self) -> u64 {
        lock(&self.wanted).lapses
    }

    /// What is wanted counts again, if there was no further lapse than the `lapses` that are known of.
    pub fn resume(&self, lapses: u64) {
        let mut wanted = lock(&self.wanted);
        if wanted.lapsed && wanted.lapses == lapses {
            wanted.lapsed = false;
            self.apply(wanted.posture);
        }
    }

    /// Whether it is closed for want of a lease.
    pub fn is_lapsed(&self) -> bool {
        self.leased && lock(&self.wanted).lapsed
    }

    fn apply(&self, posture: Posture) {
        self.signal.posture.store(posture as u8, Ordering::SeqCst);
        if posture == Posture::Open {
            self.nodes.iter().for_each(|node| lock(node).shut = false);
            for waiting in std::mem::take(&mut *lock(&self.line)) {
                // Who has given up is not there to hear it.
                let _ = waiting.send(());
            }
        }
        self.signal.changed.notify_waiters();
    }

    /// Tells all connections of sessions to `node` that there are now to close, whatever runs on them. While the gate
    /// is [`Posture::Closed`], there are no new ones either.
    pub fn close_sockets(&self, node: NodeId) {
        let Some(sockets) = self.nodes.get(node.index()) else { return };
        let told = {
            let mut sockets = lock(sockets);
            sockets.shut |= self.posture() == Posture::Closed;
            let fresh = Sockets::new(&self.signal, sockets.current.leased);
            let told = std::mem::replace(&mut sockets.current, fresh);
            told.closed.store(true, Ordering::SeqCst);
            sockets.closing.push(told.clone());
            told
        };
        self.closings.fetch_add(1, Ordering::SeqCst);
        told.told.notify_waiters();
        self.signal.changed.notify_waiters();
    }

    /// How many of the connections to `node` that were told to close are still there.
    pub fn sockets_left(&self, node: NodeId) -> usize {
        let Some(sockets) = self.nodes.get(node.index()) else { return 0 };
        let closing = &mut lock(sockets).closing;
        closing.retain(|told| told.open.load(Ordering::SeqCst) > 0);
        closing.iter().map(|told| told.open.load(Ordering::SeqCst)).sum()
    }

    /// How many connections of sessions there are, to all nodes.
    pub fn sockets_open(&self) -> usize {
        let open = |sockets: &Arc<Sockets>| sockets.open.load(Ordering::SeqCst);
        let of = |node: &Mutex<NodeSockets>| {
            let sockets = lock(node);
            open(&sockets.current) + sockets.closing.iter().map(open).sum::<usize>()
        };
        self.nodes.iter().map(of).sum()
    }

    /// Resolves when all connections to `node` that were told to close are gone.
    pub async fn sockets_closed(&self, node: NodeId) {
        self.until(|| self.sockets_left(node) == 0).await;
    }

    /// How many sessions are on the primary: a statement of theirs runs there, or a transaction is open. Exact once
    /// it is zero and the gate is not open; else a figure.
    pub fn on_primary(&self) -> usize {
        self.shards.iter().map(|shard| shard.here.load(Ordering::SeqCst)).sum()
    }

    /// Resolves when the gate is not open and nobody is on the primary any more.
    pub async fn drained(&self) {
        self.until(|| self.posture() != Posture::Open && self.on_primary() == 0).await;
    }

    async fn until(&self, holds: impl Fn() -> bool) {
        loop {
            let changed = self.signal.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if holds() {
                return;
            }
            changed.await;
        }
    }

    /// Sessions that wait to be let in.
    pub fn waiting(&self) -> usize {
        lock(&self.line).iter().filter(|waiting| !waiting.is_closed()).count()
    }

    /// Resolves when connections have been told to close more often than `seen`, which is how often that was. For
    /// whoever keeps connections that nobody uses.
    pub async fn closing(&self, seen: &mut u64) {
        self.until(|| self.closings.load(Ordering::SeqCst) > *seen).await;
        *seen = self.closings.load(Ordering::SeqCst);
    }

    /// So many sessions may wait at once from now on; those that do stay.
    pub fn bound(&self, most_waiting: usize) {
        self.most_waiting.store(most_waiting, Ordering::Relaxed);
    }

    // For the way of the statements.

    /// Whether new work may go to the primary now.
    pub fn posture(&self) -> Posture {
        self.signal.posture()
    }

    /// For a session of `worker`.
    pub fn presence(&self, worker: usize) -> Presence {
        Presence { shard: self.shards[worker % self.shards.len()].clone(), here: false }
    }

    /// A place in the line; `None`: it is full.
    pub fn line_up(&self) -> Option<Place<'_>> {
        let (sender, receiver) = oneshot::channel();
        let mut line = lock(&self.line);
        if self.posture() == Posture::Open {
            // Opened just now: whoever comes after this is in line behind nobody.
            let _ = sender.send(());
            return Some(Place { gate: self, receiver });
        }
        let most = self.most_waiting.load(Ordering::Relaxed);
        if line.len() >= most {
            line.retain(|waiting| !waiting.is_closed());
            if line.len() >= most {
                return None;
            }
        }
        line.push_back(sender);
        Some(Place { gate: self, receiver })
    }

    /// A connection to `node` is about to be opened: it is counted as long as the result is kept. `None`: there are
    /// to be none now.
    pub fn socket(&self, node: NodeId) -> Option<Socket> {
        let sockets = lock(self.nodes.get(node.index())?);
        if sockets.shut {
            return None;
        }
        sockets.current.open.fetch_add(1, Ordering::SeqCst);
        Some(Socket(sockets.current.clone()))
    }
}

/// Whether a session is on the primary.
#[derive(Debug)]
pub struct Presence {
    shard: Arc<Shard>,
    here: bool,
}

impl Presence {
    /// The session is about to use the primary. `false`: it may not, the gate is not open.
    #[must_use]
    pub fn enter(&mut self) -> bool {
        if !self.here {
            // First counted, then asked; the gate is first closed, then counted. So nobody slips through.
            self.here = true;
            self.shard.here.fetch_add(1, Ordering::SeqCst);
        }
        if self.shard.signal.posture() == Posture::Open {
            return true;
        }
        self.leave();
        false
    }

    /// It has nothing there any more that is underway.
    pub fn leave(&mut self) {
        if std::mem::take(&mut self.here) {
            self.shard.here.fetch_sub(1, Ordering::SeqCst);
            if self.shard.signal.posture() != Posture::Open {
                self.shard.signal.changed.notify_waiters();
            }
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A place in the line before the gate; given up when dropped.
#[derive(Debug)]
pub struct Place<'a> {
    gate: &'a Gate,
    receiver: oneshot::Receiver<()>,
}

impl Place<'_> {
    /// Resolves when the gate lets this one in, who may try again then.
    pub async fn let_in(&mut self) {
        // A gate that is gone lets everybody in.
        let _ = (&mut self.receiver).await;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        lock(&self.gate.line).retain(|waiting| !waiting.is_closed());
    }
}

/// A connection of a session's to a node, as the gate counts it. Belongs beside the connection itself and is dropped
/// after it.
#[derive(Debug)]
pub struct Socket(Arc<Sockets>);

impl Socket {
    /// Whether it was told to close, or leads to the primary and the lease is over: a process that was stopped meanwhile
    /// may go on with this connection before anybody could tell it to close.
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Relaxed) || self.0.leased.is_some_and(|node| self.is_over(node))
    }

    fn is_over(&self, node: NodeId) -> bool {
        self.0.signal.lease.is_about(node) && self.0.signal.lease.is_over()
    }

    /// Resolves when it is told to close.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let sockets = self.0.clone();
        async move {
            loop {
                let told = sockets.told.notified();
                tokio::pin!(told);
                told.as_mut().enable();
                if sockets.closed.load(Ordering::SeqCst) {
                    return;
                }
                told.await;
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
        if self.0.closed.load(Ordering::SeqCst) {
            self.0.signal.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const NODE: NodeId = NodeId(0);
    const OTHER: NodeId = NodeId(1);

    fn gate() -> Gate {
        Gate::new(2, 2, 2)
    }

    fn is_done(future: impl Future<Output = ()>) -> bool {
        Box::pin(future).now_or_never().is_some()
    }

    #[test]
    fn nobody_enters_while_it_is_not_open_and_who_is_there_may_stay() {
        for posture in [Posture::Paused, Posture::Draining, Posture::Closed] {
            let gate = gate();
            let (mut old, mut new) = (gate.presence(0), gate.presence(1));
            assert!(old.enter());
            assert!(!is_done(gate.drained()), "it is open");
            gate.set(posture);
            assert!(!new.enter());
            assert_eq!(gate.on_primary(), 1);
            assert!(!is_done(gate.drained()));
            old.leave();
            assert!(is_done(gate.drained()));
            gate.set(Posture::Open);
            assert!(new.enter() && !is_done(gate.drained()));
            drop(new);
            assert_eq!(gate.on_primary(), 0);
        }
    }

    #[tokio::test]
    async fn who_waits_for_the_last_to_leave_hears_it() {
        let gate = Arc::new(gate());
        let (mut one, mut two) = (gate.presence(0), gate.presence(1));
        assert!(one.enter() && two.enter());
        gate.set(Posture::Draining);
        let waits = tokio::spawn({
            let gate = gate.clone();
            async move { gate.drained().await }
        });
        one.leave();
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        drop(two);
        waits.await.unwrap();
    }

    #[test]
    fn the_line_is_bounded_and_goes_in_in_its_order() {
        let gate = gate();
        gate.set(Posture::Paused);
        let (mut first, mut second) = (gate.line_up().unwrap(), gate.line_up().unwrap());
        assert!(gate.line_up().is_none(), "there is room for two");
        assert_eq!(gate.waiting(), 2);
        // Whatever happens but opening lets nobody in.
        gate.set(Posture::Closed);
        assert!(!is_done(first.let_in()) && !is_done(second.let_in()));
        drop(first);
        let mut third = gate.line_up().expect("one has given up");
        let order: Vec<bool> = {
            let line = lock(&gate.line);
            line.iter().map(oneshot::Sender::is_closed).collect()
        };
        assert_eq!(order, [false, false]);
        gate.set(Posture::Open);
        assert!(is_done(second.let_in()) && is_done(third.let_in()));
        assert!(is_done(gate.line_up().unwrap().let_in()), "nobody lines up before an open gate");
        assert_eq!(gate.waiting(), 0);
    }

    #[test]
    fn connections_that_are_told_to_close_are_waited_for_and_newer_ones_are_not() {
        let gate = gate();
        let (one, two) = (gate.socket(NODE).unwrap(), gate.socket(NODE).unwrap());
        let elsewhere = gate.socket(OTHER).unwrap();
        assert!(is_done(gate.sockets_closed(NODE)), "none was told");
        gate.close_sockets(NODE);
        assert!(one.is_closed() && two.is_closed() && !elsewhere.is_closed());
        assert!(is_done(one.closed()) && !is_done(elsewhere.closed()));
        let newer = gate.socket(NODE).expect("the gate is open");
        assert!(!newer.is_closed());
        drop(one);
        assert_eq!(gate.sockets_left(NODE), 1);
        drop(two);
        assert!(is_done(gate.sockets_closed(NODE)));
        // A second time, with the first not quite over.
        gate.close_sockets(NODE);
        let newest = gate.socket(NODE).unwrap();
        gate.close_sockets(NODE);
        assert_eq!(gate.sockets_left(NODE), 2);
        drop((newer, newest));
        assert!(is_done(gate.sockets_closed(NODE)));
    }

    #[test]
    fn a_closed_gate_lets_no_new_connection_reach_the_node_that_was_left() {
        let gate = gate();
        gate.set(Posture::Closed);
        gate.close_sockets(NODE);
        assert!(gate.socket(NODE).is_none());
        assert!(gate.socket(OTHER).is_some(), "reads go on there");
        gate.set(Posture::Open);
        assert!(gate.socket(NODE).is_some());
    }

    #[test]
    fn without_a_lease_it_is_closed_whatever_is_wanted_and_nothing_of_the_primary_is_passed_on() {
        let gate = Gate::leased(2, 1, 2);
        gate.leads_to(Some(NODE));
        gate.set(Posture::Open);
        assert_eq!(gate.posture(), Posture::Closed);
        assert!(gate.is_lapsed() && !gate.holds_lease());
        gate.lease(boottime() + Duration::from_secs(3600));
        gate.resume(gate.lapses());
        assert!(gate.holds_lease() && !gate.is_lapsed());
        let (primary, replica) = (gate.socket(NODE).unwrap(), gate.socket(OTHER).unwrap());
        assert_eq!((gate.posture(), primary.is_closed()), (Posture::Open, false));
        // The time is over, and nobody has said so yet.
        gate.lease(boottime());
        assert!(primary.is_closed() && !replica.is_closed() && !gate.holds_lease());
        assert_eq!(gate.sockets_open(), 2);
        let known = gate.lapses();
        gate.lapse();
        assert!(is_done(primary.closed()) && !is_done(replica.closed()));
        assert!(gate.socket(NODE).is_none());
        gate.resume(known);
        assert_eq!(gate.posture(), Posture::Closed, "somebody who did not know of the lapse");
        gate.resume(gate.lapses());
        assert_eq!(gate.posture(), Posture::Open);
        // What is wanted meanwhile counts afterwards.
        gate.lapse();
        gate.set(Posture::Paused);
        gate.resume(gate.lapses());
        assert_eq!(gate.posture(), Posture::Paused);
    }

    #[tokio::test]
    async fn whoever_keeps_idle_connections_hears_of_each_closing() {
        let gate = Arc::new(gate());
        let mut seen = 0;
        assert!(!is_done(gate.closing(&mut seen)));
        gate.close_sockets(NODE);
        gate.closing(&mut seen).await;
        assert_eq!(seen, 1);
        assert!(!is_done(gate.closing(&mut seen)));
    }

    #[test]
    fn nobody_slips_through_while_it_closes() {
        let gate = Arc::new(Gate::new(1, 4, 1));
        let entered = Arc::new(AtomicUsize::new(0));
        let after = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let (gate, entered, after) = (gate.clone(), entered.clone(), after.clone());
                scope.spawn(move || {
                    let mut presence = gate.presence(worker);
                    while presence.enter() {
                        entered.fetch_add(1, Ordering::SeqCst);
                        assert!(!after.load(Ordering::SeqCst), "it was drained");
                        presence.leave();
                    }
                });
            }
            while entered.load(Ordering::SeqCst) < 1000 {
                std::hint::spin_loop();
            }
            gate.set(Posture::Draining);
            while gate.on_primary() > 0 {
                std::hint::spin_loop();
            }
            after.store(true, Ordering::SeqCst);
        });
    }
}
