//! Keeps `synchronous_standby_names` (`durability: quorum`): looks at the nodes while all is well, and carries out what
//! [`Sync`] decides. Deliberately does nothing during a failover: a loosened rule would let the old primary
//! acknowledge again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::failover::orders::Hands;
use crate::failover::sync::{Look, Quorum, Sender, Standby, Sync, SyncAction, SyncEvent, SyncSettings};
use crate::node::{ControlSession, NodeError, Nodes};
use crate::topology::{Epoch, NodeId};

const SETTING: &str = "SELECT current_setting('synchronous_standby_names'), pg_current_wal_insert_lsn()";
const SENDERS: &str = "SELECT application_name, sync_state <> 'async' FROM pg_stat_replication";
const STANDBY: &str = "\
SELECT status = 'streaming', received_tli, pg_last_wal_receive_lsn() FROM pg_stat_get_wal_receiver()";

/// What is kept for one primary.
pub struct Keeper {
    /// The decisions.
    pub sync: Sync,
    /// Whose they are.
    pub primary: NodeId,
    /// Of which epoch.
    pub epoch: Epoch,
    /// A look is under way.
    pub looking: bool,
    /// The next one.
    pub look_at: Instant,
}

impl Keeper {
    /// Begins with what is recorded for this primary.
    pub fn new(config: &Config, primary: NodeId, epoch: Epoch, recorded: Quorum) -> Keeper {
        let sync = config.failover.sync;
        let settings = SyncSettings {
            manage: sync.manage,
            num: usize::try_from(sync.num).unwrap_or(usize::MAX),
            degrade_after: sync.degrade_after,
            strict: sync.strict,
        };
        let names: Vec<String> = config.nodes.iter().map(|node| node.name.clone()).collect();
        let sync = Sync::new(settings, names, others(config, primary), recorded);
        Keeper { sync, primary, epoch, looking: false, look_at: Instant::now() }
    }
}

/// The nodes but this one, as far as they are still in the configuration.
pub fn others(config: &Config, primary: NodeId) -> Vec<NodeId> {
    let all = (0u16..).map(NodeId).zip(&config.nodes);
    all.filter(|(id, node)| *id != primary && !node.removed).map(|(id, _)| id).collect()
}

/// One look at the primary, then at the others beside each other. `None`: the primary did not answer.
pub async fn look(
    nodes: Arc<Nodes>,
    primary: NodeId,
    others: Vec<NodeId>,
    deadline: Duration,
) -> Option<Look> {
    let asked_at = Instant::now();
    let session = nodes.session(primary, "highwater look", deadline).await.ok()?;
    let timeline = "SELECT ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int";
    let timeline = session.ask(timeline, deadline).await.ok()?.first()?.first()?.clone()?;
    let shown = session.ask(SETTING, deadline).await.ok()?;
    let [Some(setting), Some(at)] = shown.first()?.as_slice() else { return None };
    let at = at.parse().ok()?;
    let senders = session.ask(SENDERS, deadline).await.ok()?;
    let sender = |row: &Vec<Option<String>>| match row.as_slice() {
        [Some(name), Some(counts)] => Some(Sender { name: name.clone(), counts: counts == "t" }),
        _ => None,
    };
    let senders = senders.iter().filter_map(sender).collect();
    let mut asked = tokio::task::JoinSet::new();
    for node in others {
        let (nodes, timeline) = (Arc::clone(&nodes), timeline.clone());
        asked.spawn(async move { standby(&nodes, node, &timeline, deadline).await.ok() });
    }
    let standbys = asked.join_all().await.into_iter().flatten().collect();
    Some(Look { asked_at, setting: setting.clone(), at, senders, standbys })
}

async fn standby(
    nodes: &Nodes,
    node: NodeId,
    timeline: &str,
    deadline: Duration,
) -> Result<Standby, NodeError> {
    let session: ControlSession = nodes.session(node, "highwater look", deadline).await?;
    let rows = session.ask(STANDBY, deadline).await?;
    let (streaming, flushed) = match rows.first().map(Vec::as_slice) {
        Some([Some(streaming), Some(received), flushed]) if received == timeline => {
            (streaming == "t", flushed.as_deref().and_then(|lsn| lsn.parse().ok()))
        }
        _ => (false, None),
    };
    Ok(Standby { node, streaming, flushed })
}

/// Carries out a statement that [`Sync`] asks for.
pub async fn carry_out(hands: &Hands, primary: NodeId, action: &SyncAction, names: &[String]) -> SyncEvent {
    let (rule, change) = match action {
        SyncAction::Set(rule) => (rule, true),
        SyncAction::Prove(rule) => (rule, false),
        SyncAction::Record(..) => return SyncEvent::Unclear,
    };
    match hands.set_names(primary, rule, names, change).await {
        Ok(lsn) => SyncEvent::InEffect(lsn),
        Err(why) => {
            tracing::warn!(why, "synchronous_standby_names could not be shown to be in effect");
            SyncEvent::Unclear
        }
    }
}
