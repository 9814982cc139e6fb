//! Finding the backend for a unit: which node may serve this session now, and waiting for one that
//! soon may. The rule itself is in `mark`, the choice among equals in `route`; here is the waiting.

use std::cell::Cell;
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::BufMut;

use super::demand::Demand;
use super::facts::Wait;
use super::mark::{self, Freshness, PrimaryVerdict, ReplicaVerdict};
use super::{End, Role, Session, canceled};
use crate::backend::pool::{AcquireError, Asker, Lease, Wish};
use crate::consistency::{LagLimit, Level, OnStale, Route};
use crate::metrics::WaitFor;
use crate::positions::{Incarnation, Sample, SampleBody};
use crate::route::RouteReason;
use crate::route::balance::{self, Candidate};
use crate::topology::{Exclusion, NodeId, Standing, Topology};
use crate::wal::Lsn;
use crate::wire::ErrorReport;

/// A backend for a unit.
pub struct Placed {
    /// It.
    pub lease: Lease,
    /// Its node.
    pub node: NodeId,
    /// The node's role.
    pub role: Role,
    /// Why there.
    pub reason: RouteReason,
}

/// How often a primary that cannot be connected to is tried again while a statement waits for it.
pub(super) const RETRY: Duration = Duration::from_millis(100);

/// A few of the replicas are asked where they are so long before all are. One that streams gets there in less.
const FEW_FOR: Duration = Duration::from_millis(2);

thread_local! {
    /// Room for the candidates of one choice, for the next one.
    static CANDIDATES: Cell<Vec<Candidate>> = const { Cell::new(Vec::new()) };
}

/// What a try at a replica came to.
enum Tried {
    Placed(Placed),
    /// The read goes to the primary.
    Primary(RouteReason),
    /// The client is told.
    Failed(ErrorReport),
}

impl Session {
    /// A backend on which the unit may run. `Ok(Err(..))`: the unit fails with this report.
    pub(super) async fn place(
        &mut self,
        demand: &Demand,
        avoid: &[NodeId],
    ) -> Result<Result<Placed, ErrorReport>, End> {
        let placed = if self.read_only {
            self.ask_freshness();
            self.place_on_standby(avoid).await
        } else {
            self.find_place(demand, avoid).await
        };
        // A failover was followed while this waited: the session is told before it is shown anything of after it.
        match (self.lost.take(), placed) {
            (Some(fork), Ok(placed)) => {
                if let Ok(placed) = placed {
                    placed.lease.give_back();
                }
                Ok(Err(lost(&fork)))
            }
            (fork, placed) => {
                self.lost = fork;
                placed
            }
        }
    }

    async fn find_place(
        &mut self,
        demand: &Demand,
        avoid: &[NodeId],
    ) -> Result<Result<Placed, ErrorReport>, End> {
        self.ask_freshness();
        let reason = match demand {
            Demand::Read { .. } if self.keeps_backend => RouteReason::Pinned,
            Demand::Read { redone: true, .. } => RouteReason::Redone,
            Demand::Read { .. } if !self.split => RouteReason::SplitOff,
            Demand::Read { .. } if self.asked_for.route == Route::Primary => RouteReason::Asked,
            Demand::Read { .. } if self.settings.keeps_on_primary() => RouteReason::Settings,
            Demand::Read { .. } if self.config.routing.shadow => {
                let reason = self.would_be();
                self.shared.metrics.shadow_reads.inc(reason.label());
                RouteReason::Shadow
            }
            Demand::Read { .. } => match self.try_replicas(avoid).await? {
                Tried::Placed(placed) => {
                    self.count_read(false);
                    return Ok(Ok(placed));
                }
                Tried::Failed(report) => return Ok(Err(report)),
                Tried::Primary(reason) => {
                    self.count_read(reason == RouteReason::Behind);
                    reason
                }
            },
            Demand::Primary { reason, .. } => *reason,
            Demand::Ours => RouteReason::NotARead,
        };
        self.place_on_primary(reason).await
    }

    async fn try_replicas(&mut self, avoid: &[NodeId]) -> Result<Tried, End> {
        match self.place_at_once(avoid) {
            Some(placed) => Ok(Tried::Placed(placed)),
            None => self.place_on_replica(avoid).await,
        }
    }

    /// A backend of a replica that may serve now, where there is one for which nothing is to be waited: most of the time.
    fn place_at_once(&mut self, avoid: &[NodeId]) -> Option<Placed> {
        let topology = self.shared.topology.load();
        self.bring_mark_forward(&topology);
        let (candidates, _) = self.candidates(&topology, avoid, Duration::ZERO);
        let node = balance::pick(&candidates, rand::random());
        CANDIDATES.set(candidates);
        let node = node?;
        let mut lease = self.pools.node(node).acquire_now(&self.startup, self.asker())?;
        lease.last_user = self.affinity;
        // No time has passed since the topology was read and the mark brought forward. Only samples sent after the
        // backend was connected speak for it.
        match self.verdict(&topology, node) {
            ReplicaVerdict::Serves { sample, incarnation }
                if sample > lease.connected_at && lease.epoch == topology.epoch && lease.is_current() =>
            {
                self.incarnation = incarnation;
                Some(Placed { lease, node, role: Role::Replica, reason: RouteReason::Read })
            }
            _ => {
                lease.give_back();
                None
            }
        }
    }

    async fn place_on_replica(&mut self, avoid: &[NodeId]) -> Result<Tried, End> {
        let begun = Instant::now();
        let patience = self.replica_patience();
        let mut wait_until = begun + patience;
        let mut queued = false;
        let mut avoid = avoid.to_vec();
        let mut waited = false;
        let (few, ask_all_at) = (Ask::Few(rand::random()), begun + FEW_FOR);
        loop {
            let shared = self.shared.clone();
            let changed = pin!(shared.positions.changed_on(self.worker));
            let (candidates, hope) = self.candidates_now(&avoid, patience);
            if let Some(node) = balance::pick(&candidates, rand::random()) {
                if waited {
                    self.waited(WaitFor::Mark, begun);
                }
                match self.lease_from(node).await? {
                    Ok(lease) => {
                        // Only samples sent after the backend was connected speak for it.
                        if self.await_fresh_sample(&lease, &mut wait_until, patience).await?
                            && lease.is_current()
                        {
                            return Ok(Tried::Placed(Placed {
                                lease,
                                node,
                                role: Role::Replica,
                                reason: RouteReason::Read,
                            }));
                        }
                        lease.give_back();
                        if let Some(tried) = self.stale(&mut wait_until, &mut queued) {
                            return Ok(tried);
                        }
                        continue;
                    }
                    Err(AcquireError::Timeout) => return Ok(Tried::Failed(self.timed_out())),
                    Err(AcquireError::Unreachable { failure, .. }) => {
                        shared.reports.report_failure(node, failure);
                        avoid.push(node);
                        continue;
                    }
                    // A login that a late replica does not know yet, or one that is full, starting or being
                    // left: not ill, but not for this read.
                    Err(AcquireError::Refused { .. } | AcquireError::Unfit(_) | AcquireError::Left) => {
                        avoid.push(node);
                        continue;
                    }
                }
            }
            if self.mark.place_stalled(&*shared.positions, &shared.topology.load()) {
                continue;
            }
            match hope {
                Hope::NobodyServes => return Ok(Tried::Primary(RouteReason::NoReplica)),
                Hope::LateClocks => return Ok(Tried::Primary(RouteReason::Clock)),
                Hope::Soon if Instant::now() < wait_until => {}
                // Asked for a replica, one waits also for one that is far behind.
                Hope::TooFar
                    if (queued || self.asked_for.route == Route::Replica) && Instant::now() < wait_until => {}
                Hope::TooFar | Hope::Soon => {
                    if waited {
                        self.waited(WaitFor::Mark, begun);
                    }
                    if let Some(tried) = self.stale(&mut wait_until, &mut queued) {
                        return Ok(tried);
                    }
                }
            }
            self.handle.facts.waits_for(Wait::For(WaitFor::Mark));
            let (whom, until) = if Instant::now() < ask_all_at {
                (few, wait_until.min(ask_all_at))
            } else {
                (Ask::All, wait_until)
            };
            self.want_samples(&avoid, Asks::of(&mut waited), whom);
            if !self.wait(changed, until).await? {
                return Ok(Tried::Failed(canceled()));
            }
        }
    }

    /// How long a read waits for a replica.
    fn replica_patience(&self) -> Duration {
        let consistency = &self.config.consistency;
        match (self.asked_for.route, self.asked_for.on_stale) {
            // There may be nobody else to go to.
            _ if self.quorum.is_some() => consistency.catch_up_wait.max(consistency.primary_read_wait),
            (Route::Replica, _) => consistency.catch_up_wait.max(consistency.primary_read_wait),
            (_, OnStale::Primary) => Duration::ZERO,
            (_, OnStale::Wait | OnStale::Error) => consistency.catch_up_wait,
        }
    }

    /// Where a read would go now, were `routing.shadow` off; that it might wait for a replica is not tried.
    fn would_be(&mut self) -> RouteReason {
        let patience = self.replica_patience();
        let (candidates, hope) = self.candidates_now(&[], patience);
        match hope {
            _ if !candidates.is_empty() => RouteReason::Read,
            Hope::NobodyServes => RouteReason::NoReplica,
            Hope::LateClocks => RouteReason::Clock,
            Hope::Soon | Hope::TooFar => {
                self.want_samples(&[], Asks::First, Ask::All);
                RouteReason::Behind
            }
        }
    }

    /// No replica is fresh enough in time: the read goes to the primary, or fails, or (`None`) waits once more
    /// because the primary has its share of such reads already.
    fn stale(&self, wait_until: &mut Instant, queued: &mut bool) -> Option<Tried> {
        let consistency = &self.config.consistency;
        if self.asked_for.on_stale == OnStale::Error {
            let report = ErrorReport::error("HW002", "no replica is fresh enough for this read")
                .detail(format!(
                    "Waited {:?} ({}); the read was not run.",
                    self.replica_patience(),
                    if self.asked_for.route == Route::Replica {
                        "consistency.primary_read_wait, as highwater.route is replica"
                    } else {
                        "consistency.catch_up_wait"
                    }
                ))
                .hint("consistency.on_stale says that such a read fails instead of going to the primary.");
            return Some(Tried::Failed(report));
        }
        if self.shared.primary_reads.allows(consistency.primary_read_cap) {
            return Some(Tried::Primary(RouteReason::Behind));
        }
        let wait = consistency.primary_read_wait;
        if !*queued {
            *queued = true;
            self.shared.metrics.primary_reads_queued.inc();
            *wait_until = Instant::now() + wait;
            return None;
        }
        if Instant::now() < *wait_until {
            return None;
        }
        self.shared.metrics.primary_reads_refused.inc();
        let report = ErrorReport::error("HW002", "no replica is fresh enough for this read, and the primary has its share")
            .detail(format!(
                "More than {} % of reads (consistency.primary_read_cap) would run on the primary; waited {wait:?} (consistency.primary_read_wait). The read was not run.",
                consistency.primary_read_cap
            ))
            .hint("Look at the replicas' lag.");
        Some(Tried::Failed(report))
    }

    /// A read was placed: on the primary because no replica was fresh enough (`stale`), or well.
    fn count_read(&self, stale: bool) {
        if self.config.consistency.primary_read_cap < 100 {
            self.shared.primary_reads.count(stale);
        }
    }

    /// Whether a replica may serve this session now, by its level.
    fn verdict(&self, topology: &Topology, node: NodeId) -> ReplicaVerdict {
        let samples = &*self.shared.positions;
        // What has been made safe since may not be so there. A session that may ask replicas for anything does.
        let safe_from = self.catalog.safe_from();
        let has_replayed =
            |sample: Sample| matches!(sample.body, SampleBody::Replica { replay, .. } if replay >= safe_from);
        if safe_from > Lsn::ZERO && !self.read_only && !samples.node(node).latest().is_some_and(has_replayed)
        {
            return ReplicaVerdict::Behind;
        }
        let level = self.level();
        if level == Level::Eventual && self.asked_for.max_lag.is_none() {
            // Any replica in service. The sample that is named is of no consequence: nothing is noted.
            return ReplicaVerdict::Serves { sample: u64::MAX, incarnation: Incarnation::default() };
        }
        let verdict = if level == Level::Eventual {
            mark::known(samples, topology, node)
        } else {
            self.mark.replica(samples, topology, node)
        };
        let ReplicaVerdict::Serves { .. } = verdict else { return verdict };
        let of_transaction = self.lazy.as_ref().map(|lazy| lazy.freshness);
        let of_statement = match &self.quorum {
            Some(quorum) if !quorum.replica(samples, node) => return ReplicaVerdict::Behind,
            Some(_) => None,
            None => self.freshness,
        };
        if [of_statement, of_transaction].iter().flatten().any(|fresh| !fresh.replica(samples, node)) {
            return ReplicaVerdict::Behind;
        }
        if self.asked_for.max_lag.is_some_and(|limit| !self.keeps(limit, topology, node)) {
            return ReplicaVerdict::Behind;
        }
        verdict
    }

    /// Whether a replica is known to be behind the primary by no more than `limit`.
    fn keeps(&self, limit: LagLimit, topology: &Topology, node: NodeId) -> bool {
        let positions = &self.shared.positions;
        let body = |node| positions.node(node).latest().map(|sample| sample.body);
        let Some(SampleBody::Replica { replay, late, .. }) = body(node) else { return false };
        // What the sample did not see of the primary is as old as it is itself.
        let behind = late.by + late.asked_at.elapsed();
        let behind_bytes = match topology.primary.and_then(body) {
            Some(SampleBody::Primary { insert, .. }) => Some(insert.bytes_since(replay)),
            _ => None,
        };
        limit.allows(Some(behind), behind_bytes)
    }

    /// A replica, for a session of the read-only port: there is no other place, so one is waited for.
    async fn place_on_standby(&mut self, avoid: &[NodeId]) -> Result<Result<Placed, ErrorReport>, End> {
        let pause = self.config.failover.pause_timeout;
        let until = Instant::now() + pause;
        loop {
            let shared = self.shared.clone();
            let changed = pin!(shared.positions.changed_on(self.worker));
            match self.try_replicas(avoid).await? {
                Tried::Placed(placed) => return Ok(Ok(Placed { role: Role::Standby, ..placed })),
                Tried::Failed(report) => return Ok(Err(report)),
                Tried::Primary(_) if Instant::now() >= until => {
                    let report = ErrorReport::error(
                        "57P03",
                        "no replica has reached what this session has seen",
                    )
                    .detail(format!(
                        "Waited {pause:?} (failover.pause_timeout). The statement was not sent to any node."
                    ));
                    return Ok(Err(report));
                }
                Tried::Primary(_) => {}
            }
            self.want_samples(avoid, Asks::Again, Ask::All);
            if !self.wait(changed, until.min(Instant::now() + RETRY)).await? {
                return Ok(Err(canceled()));
            }
        }
    }

    pub(super) fn is_drained(&self, node: NodeId) -> bool {
        self.shared.topology.is_drained(node)
    }

    /// The same as of now.
    fn candidates_now(&mut self, avoid: &[NodeId], patience: Duration) -> (Vec<Candidate>, Hope) {
        let topology = self.shared.topology.load_full();
        self.bring_mark_forward(&topology);
        self.candidates(&topology, avoid, patience)
    }

    /// The replicas that may serve this session now; when there is none, whether one soon may. The mark was brought
    /// forward to `topology`.
    fn candidates(
        &mut self,
        topology: &Topology,
        avoid: &[NodeId],
        patience: Duration,
    ) -> (Vec<Candidate>, Hope) {
        let keeps_off = self.keeps_off_late_clocks(topology);
        let mut kept_off = false;
        let mut candidates = CANDIDATES.take();
        candidates.clear();
        let mut hope = Hope::NobodyServes;
        for view in topology.serving_replicas().filter(|v| !avoid.contains(&v.id) && !self.is_drained(v.id)) {
            if keeps_off && self.shared.positions.node(view.id).has_late_clock() {
                kept_off = true;
                continue;
            }
            match self.verdict(topology, view.id) {
                ReplicaVerdict::Serves { .. } => candidates.push(Candidate {
                    node: view.id,
                    weight: view.weight,
                    outstanding: self.shared.pools.context.outstanding[view.id.index()]
                        .load(std::sync::atomic::Ordering::Relaxed),
                    near: self.config.is_near(view.id.index()),
                }),
                ReplicaVerdict::Behind | ReplicaVerdict::Unresolved | ReplicaVerdict::Unknown => {
                    if self.soon(view.id, patience) {
                        hope = Hope::Soon;
                    } else if hope == Hope::NobodyServes {
                        hope = Hope::TooFar;
                    }
                }
            }
        }
        if candidates.is_empty() && hope == Hope::NobodyServes {
            let late = Standing::Excluded(Exclusion::TooFarBehind);
            if topology.nodes.iter().any(|v| v.standing == late) {
                hope = Hope::TooFar;
            } else if kept_off {
                hope = Hope::LateClocks;
            }
        }
        (candidates, hope)
    }

    /// Whether a replica may be expected to catch up within `patience`. What the topology says of it is as old as
    /// the last probe; a sample that is old, too, is worth a newer one before the read goes to the primary.
    fn soon(&self, node: NodeId, patience: Duration) -> bool {
        match self.shared.positions.node(node).latest().map(|sample| sample.body) {
            Some(body @ SampleBody::Replica { late, .. }) => {
                late.asked_at.elapsed() > patience || body.catch_up(self.must_reach()) <= patience
            }
            _ => true,
        }
    }

    /// The position that a replica must have reached to serve this statement, as far as it is known.
    fn must_reach(&self) -> Lsn {
        let fresh = self.freshness.and_then(|freshness| freshness.reached());
        let of_transaction = self.lazy.as_ref().and_then(|lazy| lazy.freshness.reached());
        let quorum = self.quorum.as_ref().and_then(|quorum| quorum.reached());
        [fresh, of_transaction, quorum].into_iter().flatten().fold(self.mark.position(), Lsn::max)
    }

    /// Asks for the samples that would let a replica serve.
    fn want_samples(&self, avoid: &[NodeId], asks: Asks, whom: Ask) {
        let topology = self.shared.topology.load();
        self.want_own_samples(asks);
        if self.asked_for.max_lag.is_some()
            && let Some(primary) = topology.primary
        {
            self.want(primary, asks);
        }
        let serving =
            || topology.serving_replicas().filter(|v| !avoid.contains(&v.id) && !self.is_drained(v.id));
        let asked = whom.among(serving().count());
        for view in serving().chain(serving()).skip(asked.start).take(asked.len()) {
            self.want(view.id, asks);
        }
    }

    fn want(&self, node: NodeId, asks: Asks) {
        let positions = self.shared.positions.node(node);
        match asks {
            Asks::First => positions.want(),
            Asks::Again => positions.want_another(),
        }
    }

    /// Asks for the samples that would resolve what the session has seen, or must be shown.
    fn want_own_samples(&self, asks: Asks) {
        let fresh = self.freshness.and_then(|freshness| freshness.awaits());
        let of_transaction = self.lazy.as_ref().and_then(|lazy| lazy.freshness.awaits());
        let quorum = self.quorum.iter().flat_map(|quorum| quorum.awaits());
        for node in self.mark.awaits().into_iter().chain(fresh).chain(of_transaction).chain(quorum) {
            self.want(node, asks);
        }
    }

    /// Whether a sample that speaks for this backend says, until then or within `patience` of now, that its
    /// node may serve.
    async fn await_fresh_sample(
        &mut self,
        lease: &Lease,
        until: &mut Instant,
        patience: Duration,
    ) -> Result<bool, End> {
        let mut waited = false;
        loop {
            let shared = self.shared.clone();
            let changed = pin!(shared.positions.changed_on(self.worker));
            let topology = shared.topology.load_full();
            self.bring_mark_forward(&topology);
            let in_service = topology.node(lease.node).standing == Standing::Replica;
            match self.verdict(&topology, lease.node) {
                ReplicaVerdict::Serves { sample, incarnation }
                    if in_service && sample > lease.connected_at && lease.epoch == topology.epoch =>
                {
                    self.incarnation = incarnation;
                    return Ok(true);
                }
                _ if !in_service || lease.epoch != topology.epoch => return Ok(false),
                _ => {}
            }
            let now = Instant::now();
            let asks = Asks::of(&mut waited);
            if asks == Asks::First {
                *until = (*until).max(now + patience);
            }
            if now >= *until {
                return Ok(false);
            }
            drop(topology);
            self.want(lease.node, asks);
            self.want_own_samples(asks);
            if !self.wait(changed, *until).await? {
                return Ok(false);
            }
        }
    }

    pub(super) async fn place_on_primary(
        &mut self,
        reason: RouteReason,
    ) -> Result<Result<Placed, ErrorReport>, End> {
        let begun = Instant::now();
        let mut pause_until = begun + self.config.failover.pause_timeout;
        let mut paused = false;
        loop {
            if let Err(report) = self.await_primary().await? {
                return Ok(Err(report));
            }
            let Some(node) = self.shared.topology.load().primary else { continue };
            let in_line = Instant::now();
            match self.lease_from(node).await? {
                Ok(mut lease) => {
                    // There was a primary: what was waited for was room in the pool, which has a bound of its own.
                    pause_until += in_line.elapsed();
                    if !lease.vouched_for && !self.await_known_start(&mut lease, pause_until).await? {
                        if self.handle.is_cancelled() {
                            lease.give_back();
                            return Ok(Err(canceled()));
                        }
                        drop(lease);
                        if Instant::now() >= pause_until {
                            return Ok(Err(no_primary(self.config.failover.pause_timeout)));
                        }
                        continue;
                    }
                    let topology = self.shared.topology.load_full();
                    if topology.primary != Some(node)
                        || topology.epoch != lease.epoch
                        || topology.epoch != self.mark.epoch()
                        || lease.socket.is_closed()
                    {
                        // The primary changed meanwhile: never a write on the old one, and none whose
                        // note the mark would not take.
                        drop(lease);
                        continue;
                    }
                    if !self.presence.enter() {
                        lease.give_back();
                        continue;
                    }
                    if paused {
                        self.waited(WaitFor::Primary, begun);
                    }
                    return Ok(Ok(Placed { lease, node, role: Role::Primary, reason }));
                }
                Err(AcquireError::Timeout) => return Ok(Err(self.timed_out())),
                Err(AcquireError::Unfit(why)) => return Ok(Err(unfit(&why))),
                Err(AcquireError::Refused { message, sqlstate }) if sqlstate != *b"57P03" => {
                    // In the server's own words, as it would have been told when it connected.
                    self.client.output.put_slice(&message);
                    return Err(End::NodeSaidFatal);
                }
                Err(AcquireError::Refused { .. } | AcquireError::Left) => {}
                Err(AcquireError::Unreachable { failure, .. }) => {
                    self.shared.reports.report_failure(node, failure);
                }
            }
            // Nothing was sent: waiting for the primary, or for the next one, is safe.
            paused = true;
            self.handle.facts.waits_for(Wait::For(WaitFor::Primary));
            if Instant::now() >= pause_until {
                return Ok(Err(no_primary(self.config.failover.pause_timeout)));
            }
            let shared = self.shared.clone();
            let changed = shared.topology.changed();
            if !self.wait(changed, pause_until.min(Instant::now() + RETRY)).await? {
                return Ok(Err(canceled()));
            }
        }
    }

    /// Whether, in time, a sample of the primary shows that a new backend is one of the server as it is known:
    /// it may have crashed since the last one, and what sessions have seen may be gone. The sampler publishes
    /// nothing of a start that the topology does not know, and its connection would not have survived a later
    /// one than that.
    async fn await_known_start(&mut self, lease: &mut Lease, until: Instant) -> Result<bool, End> {
        loop {
            let shared = self.shared.clone();
            let changed = pin!(shared.positions.changed_on(self.worker));
            let epoch = shared.topology.load().epoch;
            if lease.epoch != epoch || lease.socket.is_closed() || Instant::now() >= until {
                return Ok(false);
            }
            let positions = shared.positions.node(lease.node);
            if positions.latest().is_some_and(|sample| sample.is_of_primary_since(lease.connected_at, epoch))
            {
                lease.vouched_for = true;
                return Ok(true);
            }
            positions.want();
            // A primary that has died gives no sample; and nobody is promoted while a connection to it is held.
            let told = lease.socket.closed();
            let either = async {
                tokio::select! {
                    () = changed => {}
                    () = told => {}
                }
            };
            if !self.wait(either, until).await? {
                return Ok(false);
            }
        }
    }

    /// Whether the primary may serve this session now, by its level.
    fn primary_verdict(&mut self, topology: &Topology) -> PrimaryVerdict {
        let samples = &*self.shared.positions;
        if self.freshness.is_none() && self.asked_for.level == Level::Strong {
            // There was no primary when the statement arrived.
            self.freshness = Freshness::of_now(samples, topology);
        }
        match self.mark.primary(samples, topology) {
            PrimaryVerdict::Serves
                if self.freshness.is_some_and(|freshness| !freshness.primary(samples, topology)) =>
            {
                PrimaryVerdict::BelowFloor
            }
            verdict => verdict,
        }
    }

    pub(super) fn leave_stalled(&mut self, topology: &Topology) -> bool {
        if let Some(shared) = &self.shared_mark {
            // The next statements of those who share it need not wait for it.
            shared.leave_stalled(&*self.shared.positions, topology);
        }
        self.mark.leave_stalled(&*self.shared.positions, topology)
    }

    /// Waits until there is a primary and it shows all that replicas have shown this session.
    pub(super) async fn await_primary(&mut self) -> Result<Result<(), ErrorReport>, End> {
        let begun = Instant::now();
        let pause_until = begun + self.config.failover.pause_timeout;
        let mut waited = None;
        let mut asked = false;
        loop {
            if let Err(report) = self.pass_gate(pause_until).await? {
                return Ok(Err(report));
            }
            let shared = self.shared.clone();
            let sampled = pin!(shared.positions.changed_on(self.worker));
            let reorganised = shared.topology.changed();
            let topology = shared.topology.load_full();
            self.bring_mark_forward(&topology);
            let what = match topology.primary {
                None => WaitFor::Primary,
                Some(primary) => match self.primary_verdict(&topology) {
                    PrimaryVerdict::Serves => {
                        if let Some(what) = waited {
                            self.waited(what, begun);
                        }
                        return Ok(Ok(()));
                    }
                    PrimaryVerdict::Unresolved(_) if self.leave_stalled(&topology) => {
                        waited = Some(WaitFor::Floor);
                        continue;
                    }
                    PrimaryVerdict::Unresolved(node) => {
                        let asks = Asks::of(&mut asked);
                        self.want(node, asks);
                        self.want(primary, asks);
                        WaitFor::Floor
                    }
                    PrimaryVerdict::BelowFloor => {
                        self.want(primary, Asks::of(&mut asked));
                        WaitFor::Floor
                    }
                },
            };
            drop(topology);
            if Instant::now() >= pause_until {
                let pause = self.config.failover.pause_timeout;
                return Ok(Err(match what {
                    WaitFor::Primary => no_primary(pause),
                    _ => self.never_caught_up(pause),
                }));
            }
            waited = Some(what);
            self.handle.facts.waits_for(Wait::For(what));
            let either = async {
                tokio::select! {
                    () = sampled => {}
                    () = reorganised => {}
                }
            };
            if !self.wait(either, pause_until).await? {
                return Ok(Err(canceled()));
            }
        }
    }

    /// The primary's floor has not reached what the session must be shown, in all that time.
    fn never_caught_up(&self, pause: Duration) -> ErrorReport {
        let primary = self.shared.topology.load().primary;
        let last = primary.and_then(|primary| self.shared.positions.node(primary).latest());
        tracing::debug!(
            mark = ?self.mark,
            freshness = ?self.freshness,
            ?last,
            "the primary could not be shown to have caught up"
        );
        ErrorReport::error("57P03", "the primary cannot be shown to have caught up with this session's reads")
            .detail(format!("Waited {pause:?} (failover.pause_timeout) for a sample of its position."))
            .hint("Look at the log for the state of the nodes.")
    }

    /// A wait that was needed is over.
    fn waited(&self, what: WaitFor, begun: Instant) {
        let time = begun.elapsed();
        self.shared.metrics.waited(what, time);
        self.handle.facts.waited(Wait::For(what), time);
    }

    /// Waits for `what`, until `deadline`. `false`: the client has cancelled meanwhile.
    pub(super) async fn wait(&self, what: impl Future<Output = ()>, deadline: Instant) -> Result<bool, End> {
        tokio::select! {
            biased;
            () = self.handle.interrupted() => {}
            node = self.left() => return Err(End::NodeLost { node }),
            _ = tokio::time::timeout_at(deadline.into(), what) => {}
        }
        if self.handle.ending() == super::handle::Ending::Now {
            return Err(End::shutdown());
        }
        Ok(!self.handle.is_cancelled())
    }

    fn patience(&self) -> Duration {
        self.config.pool.query_wait_timeout
    }

    /// No backend was had: the client has cancelled, or time is up.
    pub(super) fn timed_out(&self) -> ErrorReport {
        if self.handle.is_cancelled() {
            return canceled();
        }
        ErrorReport::error("53300", "no backend became free in time")
            .detail(format!("Waited {:?} (pool.query_wait_timeout).", self.patience()))
            .hint("Raise pool.size (or pool.max_backends_per_node), or shorten transactions.")
    }

    /// As whom the pools know the session, and what the running unit would rather have.
    fn asker(&self) -> Asker {
        let wish = if self.asks_sequences {
            Wish::Writer(self.handle.pid)
        } else if self.asks_process {
            Wish::Own
        } else {
            Wish::Recent
        };
        Asker { session: self.affinity, worker: self.worker, wish, now: self.started }
    }

    pub(super) async fn lease_from(&self, node: NodeId) -> Result<Result<Lease, AcquireError>, End> {
        let begun = Instant::now();
        let asker = Asker { now: begun, ..self.asker() };
        let pool = self.pools.node(node);
        let lease = match pool.acquire_now(&self.startup, asker) {
            // Most of the time: nothing needs to be shown or measured.
            Some(lease) => Ok(lease),
            None => {
                let acquire = pin!(pool.acquire(&self.startup, asker, self.patience()));
                self.await_lease(acquire, begun).await?
            }
        };
        Ok(lease.map(|mut lease| {
            lease.last_user = self.affinity;
            lease
        }))
    }

    async fn await_lease(
        &self,
        acquire: impl Future<Output = Result<Lease, AcquireError>>,
        begun: Instant,
    ) -> Result<Result<Lease, AcquireError>, End> {
        self.handle.facts.waits_for(Wait::For(WaitFor::Backend));
        let lease = tokio::select! {
            biased;
            lease = acquire => lease,
            () = self.handle.interrupted() => {
                if self.handle.ending() == super::handle::Ending::Now {
                    return Err(End::shutdown());
                }
                Err(AcquireError::Timeout)
            }
        };
        // The pool has measured it.
        self.handle.facts.waited(Wait::For(WaitFor::Backend), begun.elapsed());
        Ok(lease)
    }
}

/// Whether a statement has asked for samples before: it gets the first at once, further ones no sooner than others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    First,
    Again,
}

/// Which of the replicas a read that waits asks where they are.
#[derive(Clone, Copy)]
enum Ask {
    /// A few, drawn by this lot: a sample costs its node and us, and what it costs must not grow with the replicas that
    /// there are.
    Few(u32),
    All,
}

impl Ask {
    /// As many as are enough to choose between.
    const FEW: usize = 2;

    /// The places of those asked, of `count` that stand in a ring.
    fn among(self, count: usize) -> std::ops::Range<usize> {
        match self {
            Ask::Few(lot) if count > Ask::FEW => {
                let first = lot as usize % count;
                first..first + Ask::FEW
            }
            Ask::Few(_) | Ask::All => 0..count,
        }
    }
}

impl Asks {
    /// From now on it has.
    fn of(before: &mut bool) -> Asks {
        if std::mem::replace(before, true) { Asks::Again } else { Asks::First }
    }
}

/// Whether a replica that may not serve yet soon may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hope {
    NobodyServes,
    /// Those that might have clocks that are behind, and the read asks for the time.
    LateClocks,
    TooFar,
    Soon,
}

pub(super) fn lost(fork: &mark::Fork) -> ErrorReport {
    ErrorReport::error("HW001", "what this session has written or seen was lost in a failover")
        .detail(fork.to_string())
        .hint("Read again what later work depends on; the session is usable.")
}

pub(super) fn no_primary(pause: Duration) -> ErrorReport {
    ErrorReport::error("57P03", "no primary is available")
        .detail(format!("Waited {pause:?} (failover.pause_timeout). The statement was not sent to any node."))
}

pub(super) fn unfit(why: &str) -> ErrorReport {
    ErrorReport::error("08006", "cannot log in to the node in this user's place")
        .detail(why.to_owned())
        .hint("Run highwater check.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_replicas_two_are_asked_and_each_in_its_turn() {
        assert_eq!(Ask::All.among(7), 0..7);
        for lot in [0, 1, u32::MAX] {
            assert_eq!(Ask::Few(lot).among(0), 0..0);
            assert_eq!(Ask::Few(lot).among(2), 0..2);
        }
        let mut asked = [0; 5];
        for lot in 0..5 {
            Ask::Few(lot).among(5).for_each(|place| asked[place % 5] += 1);
        }
        assert_eq!(asked, [2; 5]);
    }
}
