//! Keeps replication slots (`failover.slots.manage`): from time to time, while all is well, looks at the nodes and does what
//! [`slots`] says. Deliberately does nothing during a failover: a re-pointing provides the slot that it
//! needs itself.
//!
//! These statements do not go through the session that holds the control lock (I10): one that lands late makes, moves or
//! drops a slot, which changes neither who follows whom nor whose confirmation counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::config::{Config, SlotsConfig};
use crate::failover::slots::{self, Change, Keeper, Part, Slot};
use crate::node::{ControlSession, NodeError, Nodes};
use crate::topology::NodeId;
use crate::wal::{Lsn, TimelineId};

/// So many `failover.check_interval` lie between two looks.
const EVERY: u32 = 20;

/// When the next look is due, and what the last one found.
#[derive(Debug, Default)]
pub struct Rounds {
    under_way: bool,
    due: Option<Instant>,
    /// The most WAL that one of the slots holds.
    pub most_held: u64,
}

impl Rounds {
    /// Whether a look is to begin now; it has, then.
    pub fn begin(&mut self, check_interval: Duration, now: Instant) -> bool {
        if self.under_way || self.due.is_some_and(|due| now < due) {
            return false;
        }
        (self.under_way, self.due) = (true, Some(now + check_interval * EVERY));
        true
    }

    /// A look has ended.
    pub fn ended(&mut self, most_held: u64) {
        (self.under_way, self.most_held) = (false, most_held);
    }
}

/// One round over the primary and the standbys that can be reached: looks at all beside each other, then changes what is not
/// as it should be. The most WAL that one slot holds.
pub async fn round(
    config: Arc<Config>,
    nodes: Arc<Nodes>,
    primary: NodeId,
    timeline: Option<TimelineId>,
    standbys: Vec<NodeId>,
) -> u64 {
    let deadline = config.failover.check_timeout;
    let prefix: Arc<str> = Arc::from(config.failover.slots.prefix.as_str());
    let mut asked = JoinSet::new();
    for node in standbys.into_iter().chain([primary]) {
        let (nodes, prefix) = (Arc::clone(&nodes), Arc::clone(&prefix));
        asked.spawn(async move {
            let session = nodes.session(node, "highwater slots", deadline).await?;
            let keeper = look(&session, node, node == primary, timeline, &prefix, deadline).await?;
            Ok::<_, NodeError>(keeper.map(|keeper| (keeper, session)))
        });
    }
    // One that does not answer is none of ours to look after now.
    let answered = asked.join_all().await.into_iter().filter_map(Result::ok).flatten();
    let (keepers, sessions): (Vec<Keeper>, Vec<ControlSession>) = answered.unzip();
    let slots = &config.failover.slots;
    warn(slots, &nodes, &keepers);
    let of = |node: &crate::config::NodeConfig| (!node.removed).then(|| slots.slot_of(&node.name));
    let names: Vec<Option<String>> = config.nodes.iter().map(of).collect();
    for (node, change) in slots::changes(&names, &keepers) {
        let Some(at) = keepers.iter().position(|keeper| keeper.node == node) else { continue };
        let node = nodes.name(node);
        match sessions[at].ask(&statement(&change), deadline).await {
            Ok(_) => tracing::debug!(node, ?change, "replication slot"),
            // Tried again in the next round: somebody may have begun to use it just now.
            Err(error) => {
                tracing::warn!(node, ?change, cause = error.cause, "a replication slot is not kept")
            }
        }
    }
    keepers.iter().flat_map(|keeper| &keeper.slots).map(|slot| slot.held).max().unwrap_or(0)
}

fn warn(slots: &SlotsConfig, nodes: &Nodes, keepers: &[Keeper]) {
    for keeper in keepers {
        for slot in keeper.slots.iter().filter(|slot| slot.held >= slots.warn_above) {
            let (node, slot, bytes) = (nodes.name(keeper.node), &slot.name, slot.held);
            tracing::warn!(
                node,
                slot,
                bytes,
                "a replication slot holds much WAL for a standby that is away or late"
            );
        }
    }
}

/// `None`: it is not what it should be, or says something that cannot be read.
async fn look(
    session: &ControlSession,
    node: NodeId,
    is_primary: bool,
    timeline: Option<TimelineId>,
    prefix: &str,
    deadline: Duration,
) -> Result<Option<Keeper>, NodeError> {
    let question = "SELECT pg_is_in_recovery(), pg_size_bytes(current_setting('wal_segment_size')), \
        (SELECT received_tli FROM pg_stat_get_wal_receiver() WHERE status = 'streaming'), \
        CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() END";
    let rows = session.ask(question, deadline).await?;
    let Some([Some(recovery), Some(segment), streams, has]) = rows.first().map(Vec::as_slice) else {
        return Ok(None);
    };
    let streams = streams.as_ref().and_then(|tli| tli.parse().ok()).map(TimelineId);
    let has = has.as_ref().and_then(|lsn| lsn.parse::<Lsn>().ok());
    let part = match (recovery.as_str(), is_primary, has) {
        ("f", true, _) => Part::Primary,
        ("t", false, Some(has)) if streams.is_some() && streams == timeline => Part::Follows(has),
        ("t", false, _) => Part::Standby,
        _ => return Ok(None),
    };
    let Ok(segment) = segment.parse() else { return Ok(None) };
    // The prefix is of letters, digits and underscores: nothing to be quoted in it.
    let question = format!(
        "SELECT slot_name, active, restart_lsn, coalesce(greatest(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() \
           THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, restart_lsn), 0), 0)::bigint \
         FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary \
           AND left(slot_name, {}) = '{prefix}'",
        prefix.len()
    );
    let slot = |row: &Vec<Option<String>>| match row.as_slice() {
        [Some(name), Some(active), start, Some(held)] => Some(Slot {
            name: name.clone(),
            active: active == "t",
            start: start.as_ref().and_then(|lsn| lsn.parse().ok()),
            held: held.parse().ok()?,
        }),
        _ => None,
    };
    let rows = session.ask(&question, deadline).await?;
    Ok(Some(Keeper { node, part, slots: rows.iter().filter_map(slot).collect(), segment }))
}

fn statement(change: &Change) -> String {
    match change {
        Change::Create(name) => format!("SELECT pg_create_physical_replication_slot('{name}', true)"),
        Change::Advance(name, to) => format!("SELECT pg_replication_slot_advance('{name}', '{to}')"),
        Change::Drop(name) => format!("SELECT pg_drop_replication_slot('{name}')"),
    }
}
