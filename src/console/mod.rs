//! The admin console: a database of its own, [`DATABASE`], on the ports where clients connect, for `auth.admins`.
//!
//! Promises: it needs no node, and has its own places when `max_clients` is reached; it shows no secret and no literal
//! of anybody's statements; what it shows is read from what the parts publish anyway, row by row as the client takes
//! them; every order says what it has done. Clients are logged in as all are, by `listener`.
//!
//! [`command`] reads its language, [`reply`] writes values, `protocol` speaks to the client (over `pgwire`), `show`
//! makes the tables, `orders` does what is ordered, `route` explains.

pub mod command;
mod orders;
mod protocol;
pub mod reply;
mod route;
mod show;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::reload::Reload;
use crate::session::handle::SessionHandle;
use crate::session::{Arrival, Shared};
use crate::topology::NodeId;

/// The name of the database that is no database.
pub const DATABASE: &str = "highwater";

/// What all connections to the console share.
pub struct Console {
    shared: Arc<Shared>,
    reload: Reload,
    steering: Steering,
    started: SystemTime,
}

/// What is ordered about the primary, with nodes and times understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Exchange a living primary.
    Switchover {
        /// For whom; `None`: the best one.
        to: Option<NodeId>,
        /// Only say what would be done.
        dry_run: bool,
        /// How long clients may wait.
        timeout: Option<Duration>,
    },
    /// Replace a dead one.
    Failover {
        /// By whom; `None`: the best one.
        to: Option<NodeId>,
        /// Also when acknowledged writes may be lost.
        allow_data_loss: bool,
    },
    /// No failover by itself.
    PauseFailover,
    /// Undoes that.
    ResumeFailover,
    /// Keep a node from taking writes.
    Fence(NodeId),
    /// Undoes that.
    Unfence(NodeId),
    /// A node is gone for good.
    Forget(NodeId),
    /// What waits for an operator goes on.
    AckRecovery,
}

/// A change of the primary, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    /// The epoch that it began.
    pub epoch: u64,
    /// When.
    pub at: SystemTime,
    /// From whom.
    pub from: NodeId,
    /// To whom.
    pub to: NodeId,
    /// Whether it was asked for.
    pub planned: bool,
    /// Bytes of acknowledged writes that were lost, at least.
    pub lost_bytes_min: u64,
    /// From the first sign to the first write possible.
    pub took: Duration,
}

/// An answer that comes when what was ordered is over.
pub type Answer = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

/// What is known of something, item by item.
pub type Items = Vec<(&'static str, Option<String>)>;

/// What replaces a primary, as the console uses it; `server` fills it in.
pub struct Steering {
    /// Gives an order.
    pub give: Box<dyn Fn(Order) -> Answer + Send + Sync>,
    /// Where it stands, as `SHOW FAILOVER` has it.
    pub status: Box<dyn Fn() -> Items + Send + Sync>,
    /// What it has done, oldest first.
    pub past: Box<dyn Fn() -> Vec<Past> + Send + Sync>,
}

impl Console {
    /// For these sessions.
    pub fn new(shared: Arc<Shared>, reload: Reload, steering: Steering) -> Console {
        Console { shared, reload, steering, started: SystemTime::now() }
    }

    /// Serves an administrator from its login to its end.
    pub async fn serve(self: &Arc<Console>, arrival: Arrival) {
        protocol::serve(self.clone(), arrival).await;
    }
}

/// One connection, as what it asks for sees it.
struct Asker<'a> {
    console: &'a Console,
    handle: &'a SessionHandle,
}
