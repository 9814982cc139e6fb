//! SQL text + catalog facts -> what a statement may do. Fail closed: what is not understood is not a read.
//!
//! The stages: a token scan of the text (`scan`), the second opinion of `sqlparser` on a thread of
//! its own (`opinion`), built-in functions by allow-list (`builtin`), the database's unsafe names
//! (`catalog`), and a cache of verdicts keyed by the scan's skeleton (`cache`).

/// What a statement may do, and so where it may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StatementClass {
    /// What it is.
    pub kind: Kind,
    /// Why it is not a read (or that it is one).
    pub reason: ClassReason,
    /// What it may leave behind on the backend that ran it.
    pub leaves: Leaves,
}

/// What a statement (or a message of several) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Changes nothing and answers the same on a replica that has reached the session's mark.
    Read,
    /// Writes, locks, or is not shown to do neither.
    Write,
    /// Data definition: a write after which the catalog facts must be read again.
    Ddl,
    /// BEGIN, COMMIT, SAVEPOINT and kin.
    TransactionControl,
    /// SET, SHOW, RESET, DISCARD, PREPARE, EXECUTE, DEALLOCATE, DECLARE, FETCH, LISTEN and kin: about the session.
    Session,
    /// Nothing but white space and comments.
    Empty,
}

/// Why a statement is classified as it is. The same value is a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClassReason {
    /// It is a read.
    Read,
    /// Its leading words say that it writes, locks or defines.
    Command,
    /// FOR UPDATE/SHARE, INTO, a data-modifying WITH.
    WriteClause,
    /// Several statements in one message.
    Several,
    /// It is about the session or a transaction.
    Session,
    /// It calls a built-in function that is not on the allow-list.
    UnsafeFunction,
    /// It names something that the catalog facts call unsafe.
    UnsafeName,
    /// The catalog facts of this database are not loaded (yet).
    CatalogUnknown,
    /// The token scan could not make sense of it.
    Unclear,
    /// The second parser refused it, disagreed, or was not asked (length, deadline).
    SecondOpinion,
    /// Client encoding or standard_conforming_strings make the text unsafe to scan.
    Lexing,
    /// A parameter's type is user-defined.
    ParameterType,
    /// A replica refused it before.
    Learned,
    /// Nothing but white space and comments.
    Empty,
}

/// What a statement may leave on its backend after its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaves {
    /// Nothing.
    Nothing,
    /// Session state for sure: the session stays on this backend.
    Pins(PinReason),
    /// It ran code that is not understood (a user's function, DO, CALL): the backend is looked at afterwards.
    Unproven,
    /// DISCARD ALL: session state and prepared statements are gone.
    DiscardsAll,
    /// DEALLOCATE ALL: prepared statements are gone.
    DeallocatesAll,
}

/// Why a session must stay on one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinReason {
    /// SET, SET ROLE, set_config(.., false), RESET of one setting...
    Setting,
    /// A temporary table, view or sequence.
    TemporaryTable,
    /// LISTEN.
    Listen,
    /// SQL-level PREPARE, EXECUTE, DEALLOCATE of a name.
    SqlPrepare,
    /// DECLARE .. WITH HOLD.
    HoldCursor,
    /// pg_advisory_lock and kin at session level.
    AdvisoryLock,
    /// pg_backend_pid().
    BackendPid,
    /// setseed, LOAD, pg_export_snapshot and others.
    Other,
    /// Code that is not understood left state behind.
    FunctionState,
    /// A statement text too long to be prepared again elsewhere.
    LargeStatement,
}
