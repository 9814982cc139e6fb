//! The hands of a failover: each [`Order`] as SQL on one node, and what became of it.
//!
//! Promises: mutating statements run in one session per node that holds an advisory lock there; whoever takes the
//! lock has first ended the session that held it, so that nothing sent before can still arrive (I10). A statement
//! that is not answered in time has an unknown outcome: its session is dropped, and the lock is taken anew before
//! anything else is done or believed. Each order may be given again, and ends by itself. What a node is told by
//! `ALTER SYSTEM` counts once a *fresh* session shows it. A `primary_conninfo` may hold a password: it is never
//! part of an error or a log line.
//!
//! Deliberately does not decide, retry an order, or keep time between orders.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, MutexGuard};

use crate::config::live::LiveConfig;
use crate::failover::conninfo::Conninfo;
use crate::failover::coordination::Leave;
use crate::failover::event::{Kick, Order, OrderResult};
use crate::failover::store::{Setting, StoreError, Upstream, Upstreams, failpoint};
use crate::failover::sync::{self, Quorum};
use crate::node::{ControlSession, NodeError, NodeFailure, Nodes};
use crate::topology::{Epoch, NodeId};
use crate::wal::{Lsn, TimelineHistory, TimelineId};

/// The two keys of the advisory lock, `hwtr` and `lock` in ASCII; it lies in the control database.
const LOCK_KEYS: (i32, i32) = (0x6877_7472, 0x6C6F_636B);
/// Settings of the session that gives orders: it writes also to a node that has been fenced, and where that takes
/// a commit it is not for it to wait for other nodes. Sessions that only look do without, to see what others see.
const SETTINGS: &str = "SET default_transaction_read_only = off; SET synchronous_commit = local; \
    SET statement_timeout = 0; SET lock_timeout = 0";
/// How often a state that is waited for is looked at.
const POLL: Duration = Duration::from_millis(10);
/// How long replay may be held up by readers before these are ended.
const READERS_GRACE: Duration = Duration::from_millis(200);
/// A kicked walreceiver that is still the old process after this does not listen: replay holds it up.
const KICK_RESTART: Duration = Duration::from_secs(1);

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A login, that of a fresh session that only looks included.
    pub connect: Duration,
    /// One statement.
    pub statement: Duration,
    /// Cutting a standby off until its position is final.
    pub sever: Duration,
    /// Re-pointing a standby until it streams.
    pub repoint: Duration,
    /// A change of `synchronous_standby_names`, which takes a checkpoint.
    pub names: Duration,
    /// Everything else.
    pub other: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connect: Duration::from_secs(1),
            statement: Duration::from_secs(2),
            sever: Duration::from_secs(3),
            repoint: Duration::from_secs(10),
            names: Duration::from_secs(60),
            other: Duration::from_secs(5),
        }
    }
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Trouble {
    /// The node answered, or says of itself, that this cannot be: nothing has changed.
    Refused(String),
    /// No answer, or not all that was waited for: it may have taken effect, or will.
    Unknown(String),
    /// It holds WAL that the new primary does not have.
    Diverged(Lsn),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Trouble {
        Trouble::Refused(error.to_string())
    }
}

/// All nodes' control sessions. Orders on one node run one after the other, on several beside each other.
pub struct Hands {
    hands: Vec<(Mutex<Hand>, Arc<AtomicUsize>)>,
}

impl Hands {
    /// `identity` tells this proxy from others (and from nobody else: it is the sessions' `application_name`).
    /// `leave`: of several proxies that give orders one at a time, asked before each statement.
    pub fn new(
        config: &Arc<LiveConfig>,
        nodes: &Arc<Nodes>,
        upstreams: &Arc<Upstreams>,
        identity: &str,
        limits: Limits,
        leave: Option<&Leave>,
    ) -> Hands {
        let hand = |index: usize| {
            let behind = Arc::new(AtomicUsize::new(0));
            let hand = Hand {
                behind: Arc::clone(&behind),
                config: Arc::clone(config),
                nodes: Arc::clone(nodes),
                upstreams: Arc::clone(upstreams),
                identity: identity.to_owned(),
                node: NodeId(index as u16),
                limits,
                leave: leave.cloned(),
                session: None,
            };
            (Mutex::new(hand), behind)
        };
        Hands { hands: (0..config.load().places()).map(hand).collect() }
    }

    /// Carries out one order, after those on the same node before it.
    pub async fn carry_out(&self, node: NodeId, order: &Order) -> OrderResult {
        let Some(mut hand) = self.hand(node).await else {
            return OrderResult::Failed("no such node in the configuration".to_owned());
        };
        let result = hand.carry_out(order).await;
        failpoint(order.label());
        result
    }

    /// On the primary `node`: makes `rule` its `synchronous_standby_names` (with `change`; else it must be it already, in
    /// whatever words), sees that it is in effect for its members and for nobody else, and answers with a position after
    /// that (I9). `names`: the nodes'.
    pub async fn set_names(
        &self,
        node: NodeId,
        rule: &Quorum,
        names: &[String],
        change: bool,
    ) -> Result<Lsn, String> {
        let Some(mut hand) = self.hand(node).await else {
            return Err("no such node in the configuration".to_owned());
        };
        let result = hand.set_names(rule, names, change).await;
        failpoint("set_names");
        result.map_err(|trouble| match trouble {
            Trouble::Refused(why) | Trouble::Unknown(why) => why,
            Trouble::Diverged(at) => format!("diverged at {at}"),
        })
    }

    /// Closes the control sessions of nodes that no order runs on: the next order finds the node where it is then.
    pub fn release_idle(&self) {
        for (hand, _) in &self.hands {
            if let Ok(mut hand) = hand.try_lock() {
                hand.session = None;
            }
        }
    }

    /// Takes the control session of a node that is to get an order soon: a login less while clients wait.
    pub async fn warm(&self, node: NodeId) {
        let Some((hand, _)) = self.hands.get(node.index()) else { return };
        // One that is at work has it.
        let Ok(mut hand) = hand.try_lock() else { return };
        if hand.session.as_ref().is_none_or(ControlSession::is_closed) {
            let until = Instant::now() + hand.limits.connect;
            hand.session = hand.take_over(until).await.ok();
        }
    }

    /// The node's hand, when the order before has ended; one that only waits for something ends for this.
    async fn hand(&self, node: NodeId) -> Option<MutexGuard<'_, Hand>> {
        let (hand, behind) = self.hands.get(node.index())?;
        behind.fetch_add(1, Ordering::SeqCst);
        let hand = hand.lock().await;
        behind.fetch_sub(1, Ordering::SeqCst);
        Some(hand)
    }

    /// Closes the control session to `node`; its lock is free then.
    pub async fn release(&self, node: NodeId) {
        if let Some((hand, _)) = self.hands.get(node.index()) {
            hand.lock().await.session = None;
        }
    }
}

struct Hand {
    config: Arc<LiveConfig>,
    nodes: Arc<Nodes>,
    upstreams: Arc<Upstreams>,
    identity: String,
    node: NodeId,
    limits: Limits,
    leave: Option<Leave>,
    session: Option<ControlSession>,
    /// Orders that wait for this one to end.
    behind: Arc<AtomicUsize>,
}

type Rows = Vec<Vec<Option<String>>>;

/// What a fresh session sees of a standby.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Standby {
    in_recovery: bool,
    severed: bool,
    walreceivers: u32,
    /// The startup process waits at the end of all WAL that the node has.
    at_end: bool,
    /// It waits for readers, who hold up replay.
    blocked: bool,
    receive: Option<Lsn>,
    replay: Option<Lsn>,
    paused: bool,
    archive: bool,
    timeline: Option<TimelineId>,
}

impl Standby {
    /// The end of the WAL that it has, unless that cannot be known now. At the end of all WAL that is the end of
    /// the last record; else what was received, which may include a part of one. Without either (a restart
    /// forgets what was received) local WAL may still be unread.
    fn end(&self) -> Option<Lsn> {
        match (self.at_end, self.receive) {
            (true, _) => self.replay,
            (false, Some(receive)) => Some(self.replay.map_or(receive, |replay| replay.max(receive))),
            (false, None) => None,
        }
    }

    /// Cut off for good, its end not to move any more (I3).
    fn final_end(&self) -> Option<Lsn> {
        let cut_off = self.in_recovery && self.severed && self.walreceivers == 0;
        if cut_off { self.end() } else { None }
    }
}

// Activity is read before the positions: once no walreceiver is left, what has been received is final. The wait
// events are those of a standby that has replayed everything and looks for more.
const STANDBY: &str = "\
SELECT a.walreceivers, a.at_end, a.blocked, pg_is_in_recovery(), \
  current_setting('primary_conninfo') = '', pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn(), \
  CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() END, \
  current_setting('restore_command') <> '', \
  (SELECT received_tli FROM pg_stat_get_wal_receiver()) \
FROM (SELECT count(*) FILTER (WHERE backend_type = 'walreceiver') AS walreceivers, \
        coalesce(bool_or(backend_type = 'startup' \
          AND wait_event IN ('RecoveryRetrieveRetryInterval', 'RecoveryWalStream')), false) AS at_end, \
        coalesce(bool_or(backend_type = 'startup' AND (wait_event LIKE 'RecoveryConflict%' \
          OR wait_event_type IN ('Lock', 'BufferPin'))), false) AS blocked \
      FROM pg_stat_activity OFFSET 0) AS a";

// A role that is no superuser may not end a superuser's session, and asking for it fails the whole statement.
const END_SESSIONS: &str = "\
SELECT count(pg_terminate_backend(a.pid)) FROM pg_stat_activity AS a JOIN pg_roles AS r ON r.rolname = a.usename \
WHERE a.backend_type = 'client backend' AND a.pid <> pg_backend_pid() AND a.usename <> current_user \
  AND (NOT r.rolsuper OR (SELECT rolsuper FROM pg_roles WHERE rolname = current_user))";

const UPSTREAM: &str = "\
SELECT name, current_setting(name), coalesce(sourcefile LIKE '%/postgresql.auto.conf', false), source \
FROM pg_settings WHERE name IN ('primary_conninfo', 'wal_receiver_status_interval', 'recovery_min_apply_delay')";

const WALRECEIVER: &str =
    "SELECT pid, status = 'streaming', received_tli FROM pg_stat_get_wal_receiver() WHERE pid IS NOT NULL";

const WRITER: &str = "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)";

impl Hand {
    fn name(&self) -> String {
        self.nodes.name(self.node)
    }

    async fn carry_out(&mut self, order: &Order) -> OrderResult {
        let done = match *order {
            Order::Kick { wait } => self.kick(wait).await.map(OrderResult::Kicked),
            Order::Fence => self.fence().await.map(|end| OrderResult::Fenced { end }),
            Order::Unfence => self.unfence().await.map(|()| OrderResult::Done),
            Order::Sever => self.sever().await.map(|(end, timeline)| OrderResult::Severed { end, timeline }),
            Order::Unsever => self.unsever().await.map(|()| OrderResult::Done),
            Order::Barrier { lsn, wait } => self.barrier(lsn, wait).await.map(OrderResult::Reached),
            Order::SetSync { ref members, num } => {
                self.set_sync(members, num).await.map(|()| OrderResult::Done)
            }
            Order::Promote { timeline, wait, .. } => self
                .promote(timeline, wait)
                .await
                .map(|(timeline, fork)| OrderResult::Promoted { timeline, fork }),
            Order::Repoint { to, timeline, fork } => {
                self.repoint(to, timeline, fork).await.map(|()| OrderResult::Done)
            }
            Order::EpochRow { epoch, timeline, fork } => {
                self.epoch_row(epoch, timeline, fork).await.map(|()| OrderResult::Done)
            }
        };
        match done {
            Ok(result) => result,
            Err(Trouble::Refused(why)) => OrderResult::Failed(why),
            Err(Trouble::Unknown(why)) => OrderResult::Unknown(why),
            Err(Trouble::Diverged(at)) => OrderResult::Diverged { at },
        }
    }

    // -----------------------------------------------------------------------------------------
    // The orders.

    /// I3. What is cleared here is cleared at each look, because an operator or a script may set it again.
    async fn sever(&mut self) -> Result<(Lsn, Option<TimelineId>), Trouble> {
        let until = Instant::now() + self.limits.sever;
        let before = self.standby(until).await?;
        self.require_standby(&before)?;
        if before.archive {
            return Err(Trouble::Refused(
                "it also recovers from an archive (restore_command), so that no position of it is final"
                    .to_owned(),
            ));
        }
        if !before.severed {
            self.keep_upstream(before.paused, until).await?;
        }
        // The brake first: a walreceiver that lives on for a moment confirms nothing more.
        self.alter("wal_receiver_status_interval", Some("0"), until).await?;
        self.alter("recovery_min_apply_delay", Some("0"), until).await?;
        self.alter("primary_conninfo", Some(""), until).await?;
        self.reload(until).await?;
        let started = Instant::now();
        let mut last = None;
        // A new session, until one shows the settings; what that one sees later is as good.
        let mut looks: Option<ControlSession> = None;
        loop {
            let look = match looks.take() {
                Some(session) => session,
                None => self.look_session(self.node, until).await?,
            };
            let rows = look
                .ask(STANDBY, self.left(until, self.limits.statement))
                .await
                .map_err(|error| Trouble::Unknown(error.to_string()))?;
            let seen = read_standby(&rows).ok_or_else(|| self.unreadable())?;
            looks = Some(look).filter(|_| seen.severed);
            let end = seen.final_end();
            if let Some(end) = end
                && last == Some(end)
            {
                let timeline = match before.timeline {
                    Some(timeline) => Some(timeline),
                    None => self.newest_timeline(until).await?,
                };
                return Ok((end, timeline));
            }
            last = end;
            self.clear_replay(&seen, started, until).await?;
            self.wait(until, || format!("it is not cut off yet ({seen})")).await?;
        }
    }

    async fn unsever(&mut self) -> Result<(), Trouble> {
        let until = Instant::now() + self.limits.other;
        let before = self.standby(until).await?;
        if !before.in_recovery {
            // Promoted since: it follows nobody.
            self.reset_receiver(until).await?;
            return Ok(self.upstreams.forget(&self.name())?);
        }
        let Some(kept) = self.upstreams.get(&self.name()) else {
            return match before.severed {
                false => Ok(()),
                true => Err(Trouble::Refused(
                    "its primary_conninfo is empty, and nothing is kept of what it was".to_owned(),
                )),
            };
        };
        self.restore("primary_conninfo", &kept.conninfo, until).await?;
        self.restore_receiver(&kept, until).await?;
        self.reload(until).await?;
        self.fresh_shows("primary_conninfo", &kept.conninfo.value, until).await?;
        if kept.paused {
            self.run("SELECT pg_wal_replay_pause()", until).await?;
        }
        Ok(self.upstreams.forget(&self.name())?)
    }

    async fn kick(&mut self, wait: Duration) -> Result<Kick, Trouble> {
        let until = Instant::now() + self.limits.statement;
        let before = self.standby(until).await?;
        self.require_standby(&before)?;
        if before.severed {
            return Err(Trouble::Refused("it has no primary_conninfo".to_owned()));
        }
        let old = self.walreceiver(until).await?.map(|seen| seen.pid);
        let conninfo = self.conninfo(until).await?.kicked();
        self.alter("primary_conninfo", Some(&conninfo.text()), until).await?;
        self.reload(until).await?;
        let started = Instant::now();
        let until = started + wait;
        loop {
            // Each look in its own time: the last one is not to fail for want of it, and the kick to be given again.
            let now = self.walreceiver(until + self.limits.statement).await?;
            match now {
                Some(Walreceiver { pid, streaming: true, .. }) if Some(pid) != old => {
                    return Ok(Kick::Streams);
                }
                Some(Walreceiver { pid, .. }) if Some(pid) == old && started.elapsed() >= KICK_RESTART => {
                    return Ok(Kick::SameProcess);
                }
                _ => {}
            }
            self.give_way()?;
            if Instant::now() + POLL >= until {
                let same = old.is_some() && now.map(|seen| seen.pid) == old;
                return Ok(if same { Kick::SameProcess } else { Kick::Gone });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn barrier(&mut self, lsn: Lsn, wait: Duration) -> Result<Lsn, Trouble> {
        let until = Instant::now() + wait;
        loop {
            let seen = self.standby(until + self.limits.statement).await?;
            self.require_standby(&seen)?;
            match seen.replay {
                Some(replay) if replay >= lsn => return Ok(replay),
                replay => {
                    self.give_way()?;
                    self.wait(until, || {
                        format!("it has replayed up to {}, not up to {lsn}", replay.unwrap_or(Lsn::ZERO))
                    })
                    .await?;
                }
            }
        }
    }

    async fn promote(&mut self, ended: TimelineId, wait: Duration) -> Result<(TimelineId, Lsn), Trouble> {
        let started = Instant::now();
        let until = started + wait;
        let before = self.standby(until).await?;
        let sent = before.in_recovery;
        if sent {
            // It was made to follow another primary meanwhile: this order is of a time that is over.
            if let Some(timeline) = before.timeline.filter(|timeline| *timeline != ended) {
                return Err(Trouble::Refused(format!("it is on timeline {timeline}, not on {ended}")));
            }
            // It only signals: an outcome is what is seen, never what this answers.
            self.run("SELECT pg_promote(false)", until).await?;
            failpoint("promote_sent");
        }
        match self.promoted(ended, started, until).await {
            Ok((timeline, Some(fork))) => Ok((timeline, fork)),
            Ok((timeline, None)) if !sent => Err(Trouble::Refused(format!(
                "its timeline {timeline} does not descend from timeline {ended}"
            ))),
            Ok((timeline, None)) => {
                Err(Trouble::Unknown(format!("where its timeline {timeline} began cannot be known")))
            }
            // It has been promoted by now, or will be: whatever cannot be done after that is no refusal (I6).
            Err(Trouble::Refused(why)) => Err(Trouble::Unknown(why)),
            Err(trouble) => Err(trouble),
        }
    }

    /// Waits until it takes writes; its timeline, and where that left the one that `ended`.
    async fn promoted(
        &mut self,
        ended: TimelineId,
        started: Instant,
        until: Instant,
    ) -> Result<(TimelineId, Option<Lsn>), Trouble> {
        loop {
            let seen = self.standby(until).await?;
            if !seen.in_recovery {
                break;
            }
            self.clear_replay(&seen, started, until).await?;
            self.wait(until, || format!("it is still in recovery ({seen})")).await?;
        }
        let timeline = self.writes(until).await?;
        let fork = match self.history(timeline, until).await {
            // The grant is missing. What it had replayed at the end stays to be seen, unless it has restarted since.
            Err(Trouble::Refused(_)) => lsn(&self.run("SELECT pg_last_wal_replay_lsn()", until).await?),
            history => history?.fork_of(ended),
        };
        self.reset_receiver(until).await?;
        self.upstreams.forget(&self.name())?;
        Ok((timeline, fork))
    }

    /// I5: what it holds is compared here, not when it was cut off.
    async fn repoint(&mut self, to: NodeId, timeline: TimelineId, fork: Lsn) -> Result<(), Trouble> {
        let until = Instant::now() + self.limits.repoint;
        let Some(target) = self.config.load().nodes.get(to.index()).map(|node| node.replication.clone())
        else {
            return Err(Trouble::Refused("no such node in the configuration".to_owned()));
        };
        loop {
            let seen = self.standby(until).await?;
            self.require_standby(&seen)?;
            if seen.timeline == Some(timeline) && seen.walreceivers > 0 {
                // It follows this timeline already, beyond the fork by right.
                break;
            }
            if !seen.severed && !seen.archive {
                // It may still receive from the old primary, which would move its position after this look.
                self.sever().await?;
                continue;
            }
            match seen.end() {
                Some(end) if end > fork => return Err(Trouble::Diverged(end)),
                Some(_) => break,
                None => self.wait(until, || format!("its position is not known yet ({seen})")).await?,
            }
        }
        let kept = self.upstreams.get(&self.name());
        let text = match (self.shown_conninfo(until).await?, &kept) {
            (shown, _) if !shown.is_empty() => shown,
            (_, Some(kept)) => kept.conninfo.value.clone(),
            (_, None) => {
                return Err(Trouble::Refused(
                    "its primary_conninfo is empty, and nothing is kept of what it was".to_owned(),
                ));
            }
        };
        let conninfo = parse_conninfo(&text)?.towards(&target.host, target.port).text();
        let shown = self.run("SELECT current_setting('primary_slot_name')", until).await?;
        let slot = self.slot_to_use(&first(&shown).unwrap_or_default());
        self.provide_slot(&slot, to, until).await?;
        if first(&shown).is_some_and(|shown| shown != slot) {
            self.alter("primary_slot_name", Some(&slot), until).await?;
        }
        self.alter("primary_conninfo", Some(&conninfo), until).await?;
        if let Some(kept) = &kept {
            self.restore_receiver(kept, until).await?;
        }
        self.reload(until).await?;
        self.fresh_shows("primary_conninfo", &conninfo, until).await?;
        loop {
            let receiver = self.walreceiver(until).await?;
            if receiver.is_some_and(|seen| seen.streaming && seen.timeline == timeline.0) {
                break;
            }
            self.give_way()?;
            // Replay that is held up does not come to the end of the old timeline.
            let seen = self.standby(until).await?;
            self.clear_replay(&seen, Instant::now(), until).await?;
            self.wait(until, || format!("it does not stream on timeline {timeline} yet ({seen})")).await?;
        }
        if kept.is_some_and(|kept| kept.paused) {
            // Whoever paused it has not resumed it.
            self.run("SELECT pg_wal_replay_pause()", until).await?;
        }
        Ok(self.upstreams.forget(&self.name())?)
    }

    /// The end that it answers covers every commit of those sessions, asynchronous ones too: a commit of our own
    /// has flushed all that was written before it.
    async fn fence(&mut self) -> Result<Lsn, Trouble> {
        let until = Instant::now() + self.limits.other;
        self.require_primary(until).await?;
        self.alter("default_transaction_read_only", Some("on"), until).await?;
        self.reload(until).await?;
        self.fresh_shows("default_transaction_read_only", "on", until).await?;
        loop {
            self.run(END_SESSIONS, until).await?;
            // Sessions that began before the reload are gone then, and idle ones of superusers, who may not be
            // ended, will be read-only with their next statement.
            let left = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                        AND usename <> current_user AND backend_start < pg_conf_load_time() AND state <> 'idle'";
            let left = first(&self.run(left, until).await?).unwrap_or_default();
            if left == "0" {
                break;
            }
            self.wait(until, || {
                format!("{left} sessions are still in transactions there (superusers' can be ended by superusers only)")
            })
            .await?;
        }
        self.run("SELECT pg_logical_emit_message(true, 'highwater', 'fence')", until).await?;
        let end = self.run("SELECT pg_current_wal_flush_lsn()", until).await?;
        lsn(&end).ok_or_else(|| self.unreadable())
    }

    async fn unfence(&mut self) -> Result<(), Trouble> {
        let until = Instant::now() + self.limits.other;
        self.alter("default_transaction_read_only", None, until).await?;
        self.reload(until).await
    }

    async fn set_sync(&mut self, members: &[NodeId], num: u32) -> Result<(), Trouble> {
        let until = Instant::now() + self.limits.other;
        let config = self.config.load_full();
        let names: Vec<&str> = members
            .iter()
            .filter_map(|member| config.nodes.get(member.index()))
            .map(|node| node.name.as_str())
            .collect();
        let value = standby_names(&names, num);
        self.alter("synchronous_standby_names", Some(&value), until).await?;
        self.reload(until).await?;
        self.fresh_shows("synchronous_standby_names", &value, until).await
    }

    async fn set_names(&mut self, rule: &Quorum, names: &[String], change: bool) -> Result<Lsn, Trouble> {
        let until = Instant::now() + self.limits.names;
        self.require_primary(until).await?;
        if change {
            let value = rule.setting(names);
            self.alter("synchronous_standby_names", Some(&value), until).await?;
            self.reload(until).await?;
            self.fresh_shows("synchronous_standby_names", &value, until).await?;
        } else {
            self.promises(rule, names, until).await?;
        }
        // The checkpointer tells backends whether to wait at all: it has read the file before it makes a checkpoint.
        // What was acknowledged before that lies behind the position that is asked for afterwards.
        self.run_within("CHECKPOINT", until, self.limits.names).await?;
        let members = rule.members.iter().filter_map(|node| names.get(node.index()));
        let list: Vec<String> = members.map(|member| literal(member)).collect();
        let list = if list.is_empty() { "NULL".to_owned() } else { list.join(", ") };
        let others = format!(
            "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' \
             AND (sync_priority > 0) IS DISTINCT FROM coalesce(application_name IN ({list}), false)"
        );
        while first(&self.run(&others, until).await?).as_deref() != Some("0") {
            if !change {
                self.promises(rule, names, until).await?;
            }
            self.wait(until, || "its senders do not go by the new synchronous_standby_names yet".to_owned())
                .await?;
        }
        lsn(&self.run("SELECT pg_current_wal_insert_lsn()", until).await?).ok_or_else(|| self.unreadable())
    }

    async fn epoch_row(&mut self, epoch: Epoch, timeline: TimelineId, fork: Lsn) -> Result<(), Trouble> {
        let until = Instant::now() + self.limits.other;
        self.require_primary(until).await?;
        let there = self.run("SELECT to_regclass('highwater.epoch') IS NOT NULL", until).await?;
        if first(&there).as_deref() == Some("t") {
            let insert = format!(
                "INSERT INTO highwater.epoch (epoch, promotion_uuid, tli, fork_lsn) \
                 VALUES ({}, gen_random_uuid(), {timeline}, '{fork}') ON CONFLICT (epoch) DO NOTHING",
                epoch.0
            );
            self.run(&insert, until).await?;
        }
        Ok(())
    }

    // -----------------------------------------------------------------------------------------
    // What orders are made of.

    /// Lets replay go on, whatever holds it up: pauses at once, readers after they have had a moment.
    async fn clear_replay(&mut self, seen: &Standby, since: Instant, until: Instant) -> Result<(), Trouble> {
        if seen.paused {
            self.run("SELECT CASE WHEN pg_is_in_recovery() THEN pg_wal_replay_resume() END", until).await?;
        }
        if seen.blocked && since.elapsed() >= READERS_GRACE {
            let busy = format!("{END_SESSIONS} AND a.state <> 'idle'");
            self.run(&busy, until).await?;
        }
        Ok(())
    }

    /// A standby that uses a slot finds none of its name on a new primary. One is made there when the role may
    /// (that grant is the operator's leave to do so); else it is for the operator.
    async fn provide_slot(&self, slot: &str, primary: NodeId, until: Instant) -> Result<(), Trouble> {
        if slot.is_empty() {
            return Ok(());
        }
        let create = format!(
            "SELECT CASE WHEN EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = {0}) THEN 'there' \
             WHEN (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user) \
             THEN (pg_create_physical_replication_slot({0}, true)).slot_name::text ELSE 'denied' END",
            literal(slot)
        );
        match first(&self.look_at(primary, &create, until).await?).as_deref() {
            Some("denied") => Err(Trouble::Refused(format!(
                "its slot `{slot}` does not exist on {}, and the role may not create it: \
                 SELECT pg_create_physical_replication_slot({}, true)",
                self.nodes.name(primary),
                literal(slot)
            ))),
            _ => Ok(()),
        }
    }

    /// By which slot it is to stream; empty: none. One that an operator has chosen stays.
    fn slot_to_use(&self, shown: &str) -> String {
        let config = self.config.load();
        let slots = &config.failover.slots;
        match slots.manage && (shown.is_empty() || shown.starts_with(&slots.prefix)) {
            true => slots.slot_of(&self.name()),
            false => shown.to_owned(),
        }
    }

    async fn keep_upstream(&mut self, paused: bool, until: Instant) -> Result<(), Trouble> {
        let mut settings = HashMap::new();
        for row in self.run(UPSTREAM, until).await? {
            let [Some(name), Some(value), Some(altered), Some(source)] = row.as_slice() else {
                return Err(self.unreadable());
            };
            if !matches!(source.as_str(), "configuration file" | "default") {
                return Err(Trouble::Refused(format!(
                    "{name} comes from {source}, where ALTER SYSTEM has no effect on it"
                )));
            }
            settings.insert(name.clone(), Setting { value: value.clone(), altered: altered == "t" });
        }
        let mut take = |name: &str| settings.remove(name).ok_or_else(|| unreadable(&self.name()));
        let upstream = Upstream {
            conninfo: take("primary_conninfo")?,
            status_interval: take("wal_receiver_status_interval")?,
            apply_delay: take("recovery_min_apply_delay")?,
            paused,
        };
        // An entry that is there is of a sever that was not undone: the brakes it shows now may be ours.
        let upstream = match self.upstreams.get(&self.name()) {
            Some(kept) => Upstream { conninfo: upstream.conninfo, ..kept },
            None => upstream,
        };
        Ok(self.upstreams.keep(&self.name(), upstream)?)
    }

    async fn restore(&mut self, name: &str, setting: &Setting, until: Instant) -> Result<(), Trouble> {
        self.alter(name, setting.altered.then_some(setting.value.as_str()), until).await
    }

    async fn restore_receiver(&mut self, kept: &Upstream, until: Instant) -> Result<(), Trouble> {
        self.restore("wal_receiver_status_interval", &kept.status_interval, until).await?;
        self.restore("recovery_min_apply_delay", &kept.apply_delay, until).await
    }

    /// On a node that has been promoted: the settings of a standby as they were. They mean nothing to a primary;
    /// who makes a replica of another node reads there how replicas log in.
    async fn reset_receiver(&mut self, until: Instant) -> Result<(), Trouble> {
        if let Some(kept) = self.upstreams.get(&self.name()) {
            self.restore("primary_conninfo", &kept.conninfo, until).await?;
            self.restore_receiver(&kept, until).await?;
            self.reload(until).await?;
        }
        Ok(())
    }

    fn require_standby(&self, seen: &Standby) -> Result<(), Trouble> {
        if seen.in_recovery { Ok(()) } else { Err(Trouble::Refused("it is not in recovery".to_owned())) }
    }

    async fn require_primary(&mut self, until: Instant) -> Result<(), Trouble> {
        let answer = self.run("SELECT pg_is_in_recovery()", until).await?;
        match first(&answer).as_deref() {
            Some("f") => Ok(()),
            _ => Err(Trouble::Refused("it is in recovery".to_owned())),
        }
    }

    async fn writes(&mut self, until: Instant) -> Result<TimelineId, Trouble> {
        let answer = first(&self.run(WRITER, until).await?);
        let timeline = answer.and_then(|digits| u32::from_str_radix(&digits, 16).ok());
        timeline.map(TimelineId).ok_or_else(|| self.unreadable())
    }

    async fn history(&mut self, of: TimelineId, until: Instant) -> Result<TimelineHistory, Trouble> {
        if of.0 <= 1 {
            return Ok(TimelineHistory::default());
        }
        let read = format!("SELECT pg_read_file('pg_wal/{:08X}.history', 0, 1048576, true)", of.0);
        let text = first(&self.run(&read, until).await?).unwrap_or_default();
        TimelineHistory::parse(&text).map_err(|_| self.unreadable())
    }

    /// The timeline of a standby whose walreceiver does not tell it: the latest one whose history it has, which is the
    /// one that it replays or will.
    async fn newest_timeline(&mut self, until: Instant) -> Result<Option<TimelineId>, Trouble> {
        let newest = "SELECT coalesce(max(left(name, 8)), '00000001') FROM pg_ls_waldir() \
                      WHERE name ~ '^[0-9A-F]{8}[.]history$'";
        let digits = first(&self.run(newest, until).await?);
        Ok(digits.and_then(|digits| u32::from_str_radix(&digits, 16).ok()).map(TimelineId))
    }

    async fn walreceiver(&mut self, until: Instant) -> Result<Option<Walreceiver>, Trouble> {
        let rows = self.run(WALRECEIVER, until).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let [Some(pid), streaming, timeline] = row.as_slice() else { return Ok(None) };
        let number = |text: &str| text.parse::<u32>().ok();
        Ok(Some(Walreceiver {
            pid: number(pid).ok_or_else(|| self.unreadable())?,
            streaming: streaming.as_deref() == Some("t"),
            timeline: timeline.as_deref().and_then(number).unwrap_or_default(),
        }))
    }

    async fn shown_conninfo(&mut self, until: Instant) -> Result<String, Trouble> {
        let rows = self.run("SELECT current_setting('primary_conninfo')", until).await?;
        first(&rows).ok_or_else(|| self.unreadable())
    }

    async fn conninfo(&mut self, until: Instant) -> Result<Conninfo, Trouble> {
        let text = self.shown_conninfo(until).await?;
        parse_conninfo(&text)
    }

    async fn alter(&mut self, name: &str, value: Option<&str>, until: Instant) -> Result<(), Trouble> {
        let statement = match value {
            Some(value) => format!("ALTER SYSTEM SET {name} = {}", literal(value)),
            None => format!("ALTER SYSTEM RESET {name}"),
        };
        self.run(&statement, until).await.map(drop)
    }

    async fn reload(&mut self, until: Instant) -> Result<(), Trouble> {
        self.run("SELECT pg_reload_conf()", until).await.map(drop)
    }

    /// Waits until a fresh session shows `value`: the postmaster has it then, and has told everybody.
    async fn fresh_shows(&mut self, name: &str, value: &str, until: Instant) -> Result<(), Trouble> {
        let question = format!("SELECT current_setting('{name}') = {}", literal(value));
        loop {
            if first(&self.look(&question, until).await?).as_deref() == Some("t") {
                return Ok(());
            }
            self.wait(until, || format!("a new session does not show the new {name} yet")).await?;
        }
    }

    /// Whether a new session shows a `synchronous_standby_names` that an operator has written, and that is `rule`.
    async fn promises(&self, rule: &Quorum, names: &[String], until: Instant) -> Result<(), Trouble> {
        let shown = self.look("SELECT current_setting('synchronous_standby_names')", until).await?;
        let promised = first(&shown).as_deref().map(|text| sync::parse_setting(text, names));
        if promised.is_some_and(|promised| promised.as_ref() == Ok(rule)) {
            return Ok(());
        }
        Err(Trouble::Refused("synchronous_standby_names has been changed meanwhile".to_owned()))
    }

    async fn standby(&mut self, until: Instant) -> Result<Standby, Trouble> {
        let rows = self.run(STANDBY, until).await?;
        read_standby(&rows).ok_or_else(|| self.unreadable())
    }

    /// One question by a session of its own.
    async fn look(&self, question: &str, until: Instant) -> Result<Rows, Trouble> {
        self.look_at(self.node, question, until).await
    }

    async fn look_at(&self, node: NodeId, question: &str, until: Instant) -> Result<Rows, Trouble> {
        let session = self.look_session(node, until).await?;
        let answer = session.ask(question, self.left(until, self.limits.statement)).await;
        answer.map_err(|error| Trouble::Unknown(error.to_string()))
    }

    async fn look_session(&self, node: NodeId, until: Instant) -> Result<ControlSession, Trouble> {
        let connecting = self.nodes.session(node, "highwater look", self.left(until, self.limits.connect));
        connecting.await.map_err(|error| Trouble::Unknown(error.to_string()))
    }

    /// One statement in the session that holds the lock.
    async fn run(&mut self, statement: &str, until: Instant) -> Result<Rows, Trouble> {
        self.run_within(statement, until, self.limits.statement).await
    }

    async fn run_within(&mut self, statement: &str, until: Instant, most: Duration) -> Result<Rows, Trouble> {
        let session = match self.session.take() {
            Some(session) if !session.is_closed() => session,
            _ => self.take_over(until).await?,
        };
        // With the lock in hand: whoever leads now has not had it since, or this session would have been ended (I10).
        self.require_leave()?;
        match session.ask(statement, self.left(until, most)).await {
            Ok(rows) => {
                self.session = Some(session);
                Ok(rows)
            }
            Err(error) if error.kind == NodeFailure::Answered => {
                self.session = Some(session);
                Err(Trouble::Refused(error.cause))
            }
            // Dropped with its connection: whatever comes next takes the lock anew.
            Err(error) => Err(Trouble::Unknown(error.to_string())),
        }
    }

    /// A session that holds the lock. Whoever held it before is ended, and has ended when this returns.
    async fn take_over(&self, until: Instant) -> Result<ControlSession, Trouble> {
        let unknown = |error: NodeError| Trouble::Unknown(error.to_string());
        let connecting = self.nodes.session(self.node, &self.identity, self.left(until, self.limits.connect));
        let session = connecting.await.map_err(unknown)?;
        let (class, object) = LOCK_KEYS;
        let take = format!("SELECT pg_try_advisory_lock({class}, {object})");
        let end_holders = lock_holders("pg_terminate_backend(a.pid)");
        loop {
            let taken = session.ask(&take, self.left(until, self.limits.statement)).await.map_err(unknown)?;
            if first(&taken).as_deref() == Some("t") {
                session.ask(SETTINGS, self.left(until, self.limits.statement)).await.map_err(unknown)?;
                return Ok(session);
            }
            self.require_leave()?;
            session.ask(&end_holders, self.left(until, self.limits.statement)).await.map_err(unknown)?;
            self.wait(until, || "the session that holds the control lock does not end".to_owned()).await?;
        }
    }

    /// Another proxy may give orders now. What was sent before that has an unknown outcome.
    fn require_leave(&self) -> Result<(), Trouble> {
        match self.leave.as_ref().is_none_or(Leave::is_given) {
            true => Ok(()),
            false => Err(Trouble::Unknown("this proxy does not lead any more".to_owned())),
        }
    }

    /// Where only something is waited for that has been set going: whoever comes next decided after this did.
    fn give_way(&self) -> Result<(), Trouble> {
        match self.behind.load(Ordering::SeqCst) {
            0 => Ok(()),
            _ => Err(Trouble::Unknown("another order came before its outcome".to_owned())),
        }
    }

    /// A pause before the next look, or the end of patience.
    async fn wait(&self, until: Instant, what: impl FnOnce() -> String) -> Result<(), Trouble> {
        if Instant::now() + POLL >= until {
            return Err(Trouble::Unknown(what()));
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }

    fn left(&self, until: Instant, most: Duration) -> Duration {
        // Never nothing: an order whose time is over fails by its own waiting, with a better reason.
        until.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(50), most)
    }

    fn unreadable(&self) -> Trouble {
        unreadable(&self.name())
    }
}

/// A query of `column` of those other sessions that hold the control lock.
pub(crate) fn lock_holders(column: &str) -> String {
    let (class, object) = LOCK_KEYS;
    format!(
        "SELECT {column} FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) \
         WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {class} AND l.objid = {object} \
         AND l.objsubid = 2 AND pid <> pg_backend_pid() \
         AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
}

#[derive(Clone, Copy, Debug)]
struct Walreceiver {
    pid: u32,
    streaming: bool,
    timeline: u32,
}

impl fmt::Display for Standby {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lsn = |lsn: Option<Lsn>| lsn.map_or_else(|| "none".to_owned(), |lsn| lsn.to_string());
        write!(f, "walreceivers {}, received {}", self.walreceivers, lsn(self.receive))?;
        write!(f, ", replayed {}", lsn(self.replay))?;
        for (what, is) in [
            ("severed", self.severed),
            ("at the end of its log", self.at_end),
            ("replay waits for readers", self.blocked),
            ("replay is paused", self.paused),
        ] {
            if is {
                write!(f, ", {what}")?;
            }
        }
        Ok(())
    }
}

fn unreadable(name: &str) -> Trouble {
    Trouble::Unknown(format!("an answer of {name} cannot be read"))
}

fn parse_conninfo(text: &str) -> Result<Conninfo, Trouble> {
    Conninfo::parse(text).map_err(|error| Trouble::Refused(format!("its primary_conninfo is {error}")))
}

fn first(rows: &Rows) -> Option<String> {
    rows.first()?.first()?.clone()
}

fn lsn(rows: &Rows) -> Option<Lsn> {
    first(rows)?.parse().ok()
}

fn read_standby(rows: &Rows) -> Option<Standby> {
    let row = rows.first()?;
    let text = |column: usize| row.get(column).cloned().flatten();
    let yes = |column: usize| text(column).as_deref() == Some("t");
    Some(Standby {
        walreceivers: text(0)?.parse().ok()?,
        at_end: yes(1),
        blocked: yes(2),
        in_recovery: yes(3),
        severed: yes(4),
        receive: text(5).and_then(|lsn| lsn.parse().ok()),
        replay: text(6).and_then(|lsn| lsn.parse().ok()),
        paused: yes(7),
        archive: yes(8),
        timeline: text(9).and_then(|timeline| timeline.parse().ok()).filter(|t| *t > 0).map(TimelineId),
    })
}

/// A string constant of SQL's, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    match doubled.contains('\\') {
        true => format!("E'{}'", doubled.replace('\\', "\\\\")),
        false => format!("'{doubled}'"),
    }
}

/// `ANY 1 ("b", "c")`; nobody: empty.
pub fn standby_names(names: &[&str], num: u32) -> String {
    if names.is_empty() || num == 0 {
        return String::new();
    }
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{}\"", name.replace('"', "\"\""))).collect();
    format!("ANY {num} ({})", quoted.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standby() -> Standby {
        Standby {
            in_recovery: true,
            severed: true,
            walreceivers: 0,
            at_end: true,
            blocked: false,
            receive: Some(Lsn(0x0400_4000)),
            replay: Some(Lsn(0x0400_3C60)),
            paused: false,
            archive: false,
            timeline: None,
        }
    }

    #[test]
    fn a_position_is_final_only_when_nothing_can_move_it() {
        let end = |change: &dyn Fn(&mut Standby)| {
            let mut standby = standby();
            change(&mut standby);
            standby.final_end()
        };
        let (received, replayed) = (Some(Lsn(0x0400_4000)), Some(Lsn(0x0400_3C60)));
        // At the end of its log: the end of the last record, not the part of one that was received.
        assert_eq!(end(&|_| {}), replayed);
        // Not there yet: what it has received is what it will have.
        assert_eq!(end(&|s| s.at_end = false), received);
        // It went backwards as a walreceiver began again at the start of a segment.
        let back = end(&|s| (s.at_end, s.receive) = (false, Some(Lsn(0x0400_0000))));
        assert_eq!(back, replayed);
        // After a restart only the end of the log tells.
        assert_eq!(end(&|s| (s.at_end, s.receive) = (false, None)), None);
        assert_eq!(end(&|s| s.receive = None), replayed);
        assert_eq!(end(&|s| s.walreceivers = 1), None);
        assert_eq!(end(&|s| s.severed = false), None);
        assert_eq!(end(&|s| s.in_recovery = false), None);
    }

    #[test]
    fn texts_are_quoted_as_the_server_reads_them() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\'b"), r"E'a\\''b'");
        assert_eq!(standby_names(&["b", "c"], 1), r#"ANY 1 ("b", "c")"#);
        assert_eq!(standby_names(&["b"], 0), "");
        assert_eq!(standby_names(&[], 2), "");
    }
}
