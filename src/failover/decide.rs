//! The failover machine: the states, and the order of steps. Pure.

use std::time::Duration;

use crate::failover::event::{Action, Event, Now, Quarantine, State};
use crate::failover::record::Record;
use crate::topology::NodeId;

/// Who begins a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// An operator.
    Manual,
    /// The machine, too.
    Auto,
}

/// What an acknowledged commit is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It may be lost with the primary.
    Async,
    /// It is on as many standbys as were configured, and survives.
    Quorum,
}

/// One node, as the configuration has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRule {
    /// Its name.
    pub name: String,
    /// Breaks ties between equal positions, the greater first; 0: never promoted.
    pub priority: u32,
}

/// The part of the configuration that the machine goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who begins a failover.
    pub mode: Mode,
    /// What a commit is worth.
    pub durability: Durability,
    /// The nodes, by [`NodeId`].
    pub nodes: Vec<NodeRule>,
    /// Soft failures in a row before a node counts as gone.
    pub failure_threshold: u32,
    /// How long a walreceiver that was made to connect anew may take to stream.
    pub kick_timeout: Duration,
    /// A server that says it is starting is waited for so long.
    pub restart_grace: Duration,
    /// More restarts than this within `crash_loop_window` are no longer waited for.
    pub crash_loop_restarts: u32,
    /// See there.
    pub crash_loop_window: Duration,
    /// No failover by itself so soon after the proxy's start.
    pub startup_grace: Duration,
    /// A reachable standby that cannot be cut off within this blocks.
    pub sever_timeout: Duration,
    /// After this a promotion whose outcome is unknown is reported as blocked (and still waited for).
    pub promote_timeout: Duration,
    /// `Async`: the most that a candidate may lack of what the primary was seen to have.
    pub max_lost_bytes: u64,
    /// No second failover by itself within this.
    pub min_failover_interval: Duration,
    /// How long a switchover may hold clients up.
    pub pause_timeout: Duration,
    /// `Async`: go on also when most nodes cannot be reached.
    pub allow_minority: bool,
    /// Fence an old primary in SQL when it can be reached.
    pub fence_sql: bool,
}

/// The machine. One per proxy, made from its record; [`step`](Self::step) is its only way to change.
#[derive(Clone, Debug)]
pub struct Machine {
    settings: Settings,
    record: Record,
    state: State,
}

impl Machine {
    /// Goes on from `record` (an empty one for a new cluster). The first [`step`](Self::step) begins.
    pub fn new(settings: Settings, record: Record, now: Now) -> Machine {
        let _ = now;
        Machine { settings, record, state: State::Starting }
    }

    /// Takes one event; what is to be done about it, in this order. The same machine, event and time give the same
    /// actions.
    pub fn step(&mut self, event: Event, now: Now) -> Vec<Action> {
        let _ = (event, now, &self.settings);
        Vec::new()
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What it would want to find after a crash now.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Why this node must not be used, whatever it says (I5, I8).
    pub fn quarantine(&self, node: NodeId) -> Option<Quarantine> {
        self.record.quarantined.iter().find(|(of, _)| *of == node).map(|(_, why)| *why)
    }
}
