//! The probe and the sampler of each node: started, and stopped where a reload takes a node out.
//!
//! Promises: what a node's tasks were doing ends with them, and what was known of its position is void before
//! anything else happens. All of it runs on one thread (the control plane's), so a task that was stopped has said
//! its last word.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinSet};

use crate::config::live::LiveConfig;
use crate::monitor::probe::{self, Observation};
use crate::monitor::sample::{PrimaryTrack, Sampler};
use crate::node::Nodes;
use crate::positions::Positions;
use crate::topology::{NodeId, TopologyHandle};

/// What the tasks of all nodes are given.
pub struct Givens {
    /// What is in force.
    pub config: Arc<LiveConfig>,
    /// The control connections.
    pub nodes: Arc<Nodes>,
    /// Who is primary, in which epoch.
    pub topology: Arc<TopologyHandle>,
    /// Where samples go.
    pub positions: Arc<Positions>,
    /// Where the primary's positions go.
    pub track: Arc<PrimaryTrack>,
    /// Where observations go.
    pub observations: mpsc::Sender<Observation>,
}

/// The tasks that watch the nodes. Dropping it stops them all.
pub struct Watch {
    givens: Givens,
    /// By node; none: it is not watched.
    running: Vec<Option<[AbortHandle; 2]>>,
    probe_now: Vec<Arc<Notify>>,
    tasks: JoinSet<()>,
}

impl Watch {
    /// Nobody is watched yet.
    pub fn new(givens: Givens) -> Watch {
        Watch { givens, running: Vec::new(), probe_now: Vec::new(), tasks: JoinSet::new() }
    }

    /// Watches `id` from now on, anew if it was watched already. Nodes are watched in the order of their numbers.
    pub fn start(&mut self, id: NodeId) {
        self.stop(id);
        while self.running.len() <= id.index() {
            self.running.push(None);
            self.probe_now.push(Arc::new(Notify::new()));
        }
        let now_please = &self.probe_now[id.index()];
        let Givens { config, nodes, topology, positions, track, observations } = &self.givens;
        let probe = self.tasks.spawn(probe::run(
            id,
            Arc::clone(nodes),
            Arc::clone(config),
            Arc::clone(now_please),
            observations.clone(),
        ));
        let sampler = Sampler {
            node: id,
            nodes: Arc::clone(nodes),
            topology: Arc::clone(topology),
            positions: Arc::clone(positions),
            track: Arc::clone(track),
            config: Arc::clone(config),
            probe: Arc::clone(now_please),
        };
        let sampler = self.tasks.spawn(sampler.run());
        self.running[id.index()] = Some([probe, sampler]);
    }

    /// Watches `id` no more: nothing is known of where it is.
    pub fn stop(&mut self, id: NodeId) {
        let Some(tasks) = self.running.get_mut(id.index()).and_then(Option::take) else { return };
        tasks.iter().for_each(AbortHandle::abort);
        self.givens.positions.node(id).lost();
        // What has ended is forgotten, or reloads would pile it up.
        while self.tasks.try_join_next().is_some() {}
    }

    /// Has `id` probed at once.
    pub fn probe(&self, id: NodeId) {
        if let Some(probe) = self.probe_now.get(id.index()) {
            probe.notify_one();
        }
    }

    /// Has all nodes probed at once.
    pub fn probe_all(&self) {
        self.probe_now.iter().for_each(|probe| probe.notify_one());
    }
}
