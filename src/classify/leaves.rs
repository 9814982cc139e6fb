//! What a statement may leave on the backend that ran it: all of it, as a set. Pure.

use std::ops::{BitOr, BitOrAssign};

/// What a statement may leave on its backend after its transaction, or takes from it: each thing for itself, as one of
/// them may end while another lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Leaves(u16);

impl Leaves {
    /// Nothing.
    pub const NOTHING: Leaves = Leaves(0);
    /// Nothing; but it shows what the session has prepared (`pg_prepared_statements`).
    pub const SHOWS_STATEMENTS: Leaves = Leaves(1 << 12);
    /// It runs code that is not understood (a user's function, DO, CALL): the backend is looked at afterwards.
    pub const UNPROVEN: Leaves = Leaves(1 << 13);
    /// DISCARD ALL: session state and prepared statements are gone.
    pub const DISCARDS_ALL: Leaves = Leaves(1 << 14);
    /// DEALLOCATE ALL: prepared statements are gone.
    pub const DEALLOCATES_ALL: Leaves = Leaves(1 << 15);

    /// The lower bits, which a [`PinSet`] takes.
    const PINS: u16 = (1 << 12) - 1;

    /// Session state for sure: the session stays on this backend.
    pub const fn pin(reason: PinReason) -> Leaves {
        Leaves(PinSet::of(reason).0)
    }

    /// Whether all of `what` is among it.
    pub const fn has(self, what: Leaves) -> bool {
        self.0 & what.0 == what.0
    }

    /// Whether nothing is left, nor taken away.
    pub const fn is_nothing(self) -> bool {
        self.0 & !Leaves::SHOWS_STATEMENTS.0 == 0
    }

    /// The reasons for which the session stays on this backend.
    pub const fn pins(self) -> PinSet {
        PinSet(self.0 & Leaves::PINS)
    }
}

// Each reason has a bit of its own, below those of what is none.
const _: () = assert!(PinReason::ALL.len() <= Leaves::PINS.count_ones() as usize);

impl BitOr for Leaves {
    type Output = Leaves;
    fn bitor(self, other: Leaves) -> Leaves {
        Leaves(self.0 | other.0)
    }
}

impl BitOrAssign for Leaves {
    fn bitor_assign(&mut self, other: Leaves) {
        self.0 |= other.0;
    }
}

/// A set of reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinSet(u16);

impl PinSet {
    /// No reason.
    pub const NONE: PinSet = PinSet(0);

    /// One reason.
    pub const fn of(reason: PinReason) -> PinSet {
        PinSet(1 << reason as u16)
    }

    /// With one more.
    pub const fn and(self, reason: PinReason) -> PinSet {
        PinSet(self.0 | PinSet::of(reason).0)
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `reason` is among them.
    pub const fn has(self, reason: PinReason) -> bool {
        self.0 & PinSet::of(reason).0 != 0
    }

    /// Those that are in both.
    pub const fn common(self, other: PinSet) -> PinSet {
        PinSet(self.0 & other.0)
    }

    /// Those that are not in `other`.
    pub const fn without(self, other: PinSet) -> PinSet {
        PinSet(self.0 & !other.0)
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = PinReason> {
        PinReason::ALL.into_iter().filter(move |reason| self.has(*reason))
    }

    /// As a number, to be kept where others read it.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// The set of which [`bits`](Self::bits) gave the number.
    pub const fn from_bits(bits: u16) -> PinSet {
        PinSet(bits)
    }
}

impl BitOr for PinSet {
    type Output = PinSet;
    fn bitor(self, other: PinSet) -> PinSet {
        PinSet(self.0 | other.0)
    }
}

impl BitOrAssign for PinSet {
    fn bitor_assign(&mut self, other: PinSet) {
        self.0 |= other.0;
    }
}

/// Why a session must stay on one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinReason {
    /// SET, set_config or RESET whose effect cannot be told, or more settings than are tracked.
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
    /// currval and lastval.
    Other,
    /// Code that is not understood left state behind.
    FunctionState,
    /// A statement text too long to be prepared again elsewhere.
    LargeStatement,
    /// State of the server process that no command takes away: setseed, LOAD, connections of dblink, a
    /// replication origin. The backend is closed after its session.
    Process,
    /// `pool.mode: session`.
    SessionPooling,
}

impl PinReason {
    /// All of them.
    pub const ALL: [PinReason; 12] = [
        PinReason::Setting,
        PinReason::TemporaryTable,
        PinReason::Listen,
        PinReason::SqlPrepare,
        PinReason::HoldCursor,
        PinReason::AdvisoryLock,
        PinReason::BackendPid,
        PinReason::Other,
        PinReason::FunctionState,
        PinReason::LargeStatement,
        PinReason::Process,
        PinReason::SessionPooling,
    ];

    /// All labels.
    pub const LABELS: [&'static str; 12] = [
        PinReason::Setting.label(),
        PinReason::TemporaryTable.label(),
        PinReason::Listen.label(),
        PinReason::SqlPrepare.label(),
        PinReason::HoldCursor.label(),
        PinReason::AdvisoryLock.label(),
        PinReason::BackendPid.label(),
        PinReason::Other.label(),
        PinReason::FunctionState.label(),
        PinReason::LargeStatement.label(),
        PinReason::Process.label(),
        PinReason::SessionPooling.label(),
    ];

    /// One word for a metric label or a log field.
    pub const fn label(self) -> &'static str {
        match self {
            PinReason::Setting => "setting",
            PinReason::TemporaryTable => "temporary_table",
            PinReason::Listen => "listen",
            PinReason::SqlPrepare => "sql_prepare",
            PinReason::HoldCursor => "hold_cursor",
            PinReason::AdvisoryLock => "advisory_lock",
            PinReason::BackendPid => "backend_pid",
            PinReason::Other => "other",
            PinReason::FunctionState => "function_state",
            PinReason::LargeStatement => "large_statement",
            PinReason::Process => "process",
            PinReason::SessionPooling => "session_pooling",
        }
    }
}
