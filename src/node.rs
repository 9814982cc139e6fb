//! Our own questions and orders to a node, in SQL, over `tokio-postgres` and `deadpool-postgres`.

use std::sync::Arc;

use crate::config::Config;
use crate::topology::NodeId;

/// The control user's connections to the nodes.
pub struct Nodes {
    #[allow(dead_code)]
    config: Arc<Config>,
}

/// A question to a node failed.
#[derive(Debug)]
pub struct NodeError {
    /// The node's name.
    pub node: String,
    /// What went wrong.
    pub cause: String,
}

impl Nodes {
    /// No connection is made yet.
    pub fn new(config: Arc<Config>) -> Arc<Nodes> {
        Arc::new(Nodes { config })
    }

    /// A connection of its own to `database` on `node` as the control user (samplers, probes). Its
    /// task is spawned on the current runtime; `Client::is_closed` says when it has ended.
    pub async fn connect(&self, _node: NodeId, _database: &str) -> Result<tokio_postgres::Client, NodeError> {
        Err(NodeError { node: String::new(), cause: String::new() })
    }

    /// A shared connection out of a small bounded pool per (node, database): auth query, catalog facts.
    pub async fn client(
        &self,
        _node: NodeId,
        _database: &str,
    ) -> Result<deadpool_postgres::Object, NodeError> {
        Err(NodeError { node: String::new(), cause: String::new() })
    }
}
