//! Demand + topology -> where, and why. Pure.
//!
//! Who may serve is decided by the session's mark (`session::mark`) and by the node's standing
//! (`topology`); this module picks among those, and names the reasons that log, metric and test show.

pub mod balance;

/// Why a statement ran where it ran. The same value is a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteReason {
    /// A read, on a replica that had reached the session's mark.
    Read,
    /// Not a read (or not shown to be one): the primary.
    NotARead,
    /// The session is inside a transaction on this node.
    InTransaction,
    /// The session is pinned to its backend.
    Pinned,
    /// `routing.split` is off.
    SplitOff,
    /// A read, but no replica is in service.
    NoReplica,
    /// A read, but no replica reached the mark within `consistency.catch_up_wait`.
    Behind,
    /// The unit was longer than may be held back to decide its route.
    TooLong,
    /// A replica refused it or went away before it had answered: run again.
    Redone,
}

impl RouteReason {
    /// All of them, in the order of their discriminants.
    pub const ALL: [RouteReason; 9] = [
        RouteReason::Read,
        RouteReason::NotARead,
        RouteReason::InTransaction,
        RouteReason::Pinned,
        RouteReason::SplitOff,
        RouteReason::NoReplica,
        RouteReason::Behind,
        RouteReason::TooLong,
        RouteReason::Redone,
    ];

    /// One word for a metric label or a log field.
    pub fn label(self) -> &'static str {
        match self {
            RouteReason::Read => "read",
            RouteReason::NotARead => "not_a_read",
            RouteReason::InTransaction => "in_transaction",
            RouteReason::Pinned => "pinned",
            RouteReason::SplitOff => "split_off",
            RouteReason::NoReplica => "no_replica",
            RouteReason::Behind => "behind",
            RouteReason::TooLong => "too_long",
            RouteReason::Redone => "redone",
        }
    }
}
