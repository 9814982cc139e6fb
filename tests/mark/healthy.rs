//! A cluster in which all is well: also for `benches/pure.rs`.

use std::sync::Arc;

use highwater::topology::{Epoch, NodeId, NodeView, Standing, Topology};
use highwater::wal::TimelineId;

/// The first of `names` is the primary, the others are its replicas in service, all on timeline 1 in epoch 1.
pub fn topology(names: &[&str]) -> Topology {
    let view = |(id, name): (usize, &&str)| NodeView {
        id: NodeId(id as u16),
        name: Arc::from(*name),
        weight: 1,
        zone: None,
        standing: if id == 0 { Standing::Primary { reachable: true } } else { Standing::Replica },
        timeline: Some(TimelineId(1)),
        replay_lag_bytes: None,
        replay_lag: None,
        server_major: Some(15),
        recovery: None,
        replay_rate: None,
        catch_up: None,
    };
    Topology {
        epoch: Epoch(1),
        system_identifier: Some(1),
        primary: Some(NodeId(0)),
        timeline: Some(TimelineId(1)),
        nodes: names.iter().enumerate().map(view).collect(),
        start: None,
        history: None,
        switches: Vec::new(),
    }
}
