//! Nodes that come and go while the proxy runs, by a reload of the configuration.
//!
//! Promises: the primary of the epoch is neither removed nor given another address, and whether it is the primary
//! is judged where primaries are made: in the control loop, in one step with the change itself. A node's number is
//! never another node's. Deliberately does not close anybody's connection: pools do, as units end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::{Loop, NodeFacts};
use crate::config::live::{Membership, NodeChange};
use crate::config::{Config, NodeConfig};
use crate::monitor::probe::Observation;
use crate::topology::{Exclusion, NodeId, NodeView, Standing, Topology};

/// A change of the configuration, and with it perhaps of the nodes.
pub struct Change {
    nodes: Vec<NodeChange>,
    /// Failover goes by something else afterwards.
    of_failover: bool,
    commit: Box<dyn FnOnce() + Send>,
    done: oneshot::Sender<Result<(), String>>,
}

/// Where the control loop is given another configuration.
#[derive(Clone)]
pub struct Members(mpsc::Sender<Change>);

impl Members {
    /// The handle, and the loop's end of it.
    pub(super) fn new() -> (Members, mpsc::Receiver<Change>) {
        // Reloads come one at a time.
        let (send, receive) = mpsc::channel(1);
        (Members(send), receive)
    }

    /// Lets the control loop put another configuration in force: it runs `commit` and follows `nodes` in one step;
    /// or refuses, says why, and nothing has changed. `of_failover`: failover goes by something else afterwards.
    pub async fn change(
        &self,
        nodes: Vec<NodeChange>,
        of_failover: bool,
        commit: impl FnOnce() + Send + 'static,
    ) -> Result<(), String> {
        let (done, answer) = oneshot::channel();
        let gone = |()| "the proxy is shutting down".to_owned();
        self.0
            .send(Change { nodes, of_failover, commit: Box::new(commit), done })
            .await
            .map_err(|_| gone(()))?;
        answer.await.unwrap_or_else(|_| Err(gone(())))
    }
}

/// How long positions of the primary are remembered, to tell replicas' lag by.
pub(super) fn keep_positions(config: &Config) -> Duration {
    config.consistency.max_lag.saturating_mul(4).max(Duration::from_secs(60))
}

/// Why `changes` cannot be followed now.
fn refusal(topology: &Topology, confirming: &[NodeId], changes: &[NodeChange]) -> Option<String> {
    let confirms = |change: &&NodeChange| {
        matches!(change.what, Membership::Removed | Membership::Moved)
            && confirming.iter().any(|node| node.index() == change.index)
    };
    if let Some(change) = changes.iter().find(confirms) {
        let name = topology.nodes.get(change.index).map_or("?", |view| &view.name);
        return Some(format!(
            "node `{name}` confirms commits (failover.sync) and cannot be removed or given another host or port"
        ));
    }
    let primary = topology.primary?;
    let change = changes.iter().find(|change| change.index == primary.index())?;
    let name = &topology.node(primary).name;
    match change.what {
        Membership::Removed => Some(format!(
            "node `{name}` is the primary and cannot be removed: switch over to another node first"
        )),
        Membership::Moved => Some(format!(
            "node `{name}` is the primary and cannot be given another host or port: switch over to another node first"
        )),
        Membership::Added | Membership::Changed => None,
    }
}

impl NodeFacts {
    /// Of a node that nothing has been heard of.
    pub(super) fn of(node: &NodeConfig) -> NodeFacts {
        NodeFacts { delayed_ok: node.delayed_ok, removed: node.removed, ..NodeFacts::default() }
    }
}

impl Loop {
    /// Follows a change, or refuses it.
    pub(super) fn take_change(&mut self, change: Change, observations: &mut mpsc::Receiver<Observation>) {
        let answer = match self.refusal(&change) {
            Some(why) => Err(why),
            None => {
                (change.commit)();
                if change.of_failover {
                    self.shell.follow(&self.config.load_full());
                }
                self.follow(&change.nodes, observations);
                Ok(())
            }
        };
        // Who asked may have gone; the change stands.
        let _ = change.done.send(answer);
    }

    fn refusal(&self, change: &Change) -> Option<String> {
        if change.of_failover
            && let Some(busy) = self.shell.is_busy()
        {
            return Some(busy);
        }
        refusal(&self.topology.load(), &self.shell.machine().record().sync.members, &change.nodes)
    }

    fn follow(&mut self, changes: &[NodeChange], observations: &mut mpsc::Receiver<Observation>) {
        let config = self.config.load_full();
        self.track.keep(keep_positions(&config));
        if changes.is_empty() {
            return;
        }
        let mut next = Topology::clone(&self.topology.load());
        for NodeChange { index, what } in changes.iter().copied() {
            let (Ok(number), Some(node)) = (u16::try_from(index), config.nodes.get(index)) else { continue };
            let id = NodeId(number);
            tracing::info!(node = %node.name, host = %node.host, port = node.port, "node {}", what.word());
            if what == Membership::Changed {
                self.facts[index].delayed_ok = node.delayed_ok;
                next.nodes[index].weight = node.weight;
                next.nodes[index].zone = node.zone.as_deref().map(Arc::from);
                continue;
            }
            self.watch.stop(id);
            self.drop_observations(id, observations);
            let view = NodeView::unknown(id, node);
            match next.nodes.get_mut(index) {
                Some(slot) => (*slot, self.facts[index]) = (view, NodeFacts::of(node)),
                None => {
                    next.nodes.push(view);
                    self.facts.push(NodeFacts::of(node));
                }
            }
            if !node.removed {
                self.watch.start(id);
            }
        }
        self.topology.publish(next);
        self.positions.wake_all();
    }

    /// What was seen of a node where it is no more is thrown away; what was seen of others is taken.
    fn drop_observations(&mut self, id: NodeId, observations: &mut mpsc::Receiver<Observation>) {
        while let Ok(observation) = observations.try_recv() {
            if observation.node != id {
                self.take_observation(observation);
            }
        }
    }
}

/// The view of a removed node: nothing is known of it.
pub(super) fn removed(old: &NodeView) -> NodeView {
    NodeView {
        id: old.id,
        name: Arc::clone(&old.name),
        weight: old.weight,
        zone: old.zone.clone(),
        standing: Standing::Excluded(Exclusion::Removed),
        timeline: None,
        replay_lag_bytes: None,
        replay_lag: None,
        server_major: None,
        recovery: None,
        replay_rate: None,
        catch_up: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_primary_is_neither_removed_nor_moved() {
        let text = "control: { user: u }\nnodes: [ { name: a, host: h }, { name: b, host: i } ]";
        let mut topology = Topology::initial(&Config::parse(text, "f", &|_| None).unwrap());
        let why = |topology: &Topology, index, what| refusal(topology, &[], &[NodeChange { index, what }]);
        assert_eq!(why(&topology, 0, Membership::Removed), None);
        topology.primary = Some(NodeId(0));
        assert!(why(&topology, 0, Membership::Removed).unwrap().contains("`a` is the primary"));
        assert!(why(&topology, 0, Membership::Moved).unwrap().contains("switch over"));
        assert_eq!(why(&topology, 0, Membership::Changed), None);
        assert_eq!(why(&topology, 1, Membership::Removed), None);
        let removed = [NodeChange { index: 1, what: Membership::Removed }];
        assert!(refusal(&topology, &[NodeId(1)], &removed).unwrap().contains("`b` confirms commits"));
    }
}
