//! Demand + topology -> where, and why. Pure.
//!
//! Who may serve is decided by the session's mark (`session::mark`) and by the node's standing
//! (`topology`); this module picks among those, and names the reasons that log, metric and test show.

pub mod balance;

use crate::classify::Kind;

/// What a unit is counted as: the class of the statement that decided its route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClassLabel {
    /// All of it is reads.
    Read,
    /// It writes, locks, or is not shown to do neither.
    Write,
    /// Data definition.
    Ddl,
    /// BEGIN, COMMIT and kin.
    TransactionControl,
    /// About the session.
    Session,
    /// A unit that was passed on without being judged as a whole: a function call, a long text, an
    /// extended-protocol unit in a transaction.
    Unit,
}

impl ClassLabel {
    /// All labels, in the order of the discriminants.
    pub const LABELS: [&'static str; 6] = ["read", "write", "ddl", "transaction", "session", "unit"];

    /// The label of a statement's kind.
    pub fn of(kind: Kind) -> ClassLabel {
        match kind {
            Kind::Read | Kind::Empty => ClassLabel::Read,
            Kind::Write => ClassLabel::Write,
            Kind::Ddl => ClassLabel::Ddl,
            Kind::TransactionControl => ClassLabel::TransactionControl,
            Kind::Session => ClassLabel::Session,
        }
    }
}

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
    /// The session has settings that are not shown to work on replicas.
    Settings,
    /// `highwater.route` is primary.
    Asked,
    /// `routing.shadow` is on: a read that would have gone elsewhere, perhaps.
    Shadow,
    /// A read that asks for the time, while the clocks of the replicas that might serve it are behind.
    Clock,
}

impl RouteReason {
    /// All labels, in the order of the discriminants.
    pub const LABELS: [&'static str; 13] = [
        "read",
        "not_a_read",
        "in_transaction",
        "pinned",
        "split_off",
        "no_replica",
        "behind",
        "too_long",
        "redone",
        "settings",
        "asked",
        "shadow",
        "clock",
    ];

    /// One word for a metric label or a log field.
    pub fn label(self) -> &'static str {
        Self::LABELS[self as usize]
    }
}
