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

use std::sync::Arc;
use std::time::SystemTime;

use crate::control::Commands;
use crate::reload::Reload;
use crate::session::handle::SessionHandle;
use crate::session::{Arrival, Shared};

/// The name of the database that is no database.
pub const DATABASE: &str = "highwater";

/// What all connections to the console share.
pub struct Console {
    shared: Arc<Shared>,
    reload: Reload,
    failover: Commands,
    started: SystemTime,
}

impl Console {
    /// For these sessions; what is ordered about the primary goes to `failover`.
    pub fn new(shared: Arc<Shared>, reload: Reload, failover: Commands) -> Console {
        Console { shared, reload, failover, started: SystemTime::now() }
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
