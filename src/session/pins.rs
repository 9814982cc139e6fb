//! Why a session is bound to its backend, and whether it still is. Pure.
//!
//! A pin lasts as long as what it is for. What a statement leaves behind is taken for granted when it
//! was one command that succeeded outside a transaction. In every other case (a transaction that may have
//! been rolled back, a failure, a command that takes such state away) the backend is asked what is there
//! once it is idle, and its answer replaces what was believed. That costs a round trip, after the client
//! has its own answer, and only for these statements. What no view of the server shows is never believed
//! to be gone, but for two things: a setting of a transaction that was rolled back for sure, and a large
//! statement whose name the session has no more.

use crate::classify::PinReason;
pub use crate::classify::PinSet;
use crate::wire::TransactionStatus;

impl PinSet {
    /// What the server's views show: a look at the backend tells whether it is there.
    pub const SHOWN: PinSet = PinSet::of(PinReason::TemporaryTable)
        .and(PinReason::Listen)
        .and(PinReason::SqlPrepare)
        .and(PinReason::HoldCursor)
        .and(PinReason::AdvisoryLock);

    /// What is undone with its transaction, and not shown.
    const UNDONE: PinSet = PinSet::of(PinReason::Setting);

    /// What not even DISCARD ALL takes from a server process.
    const LASTING: PinSet = PinSet::of(PinReason::Process);
}

/// The reasons that a completed command may have ended, by its tag. `writes`: it is, or is in a unit with,
/// what is not a read (`SELECT pg_advisory_unlock_all()`).
pub fn ended_by(tag: &[u8], writes: bool) -> PinSet {
    let starts = |with: &[u8]| tag.starts_with(with);
    if starts(b"SELECT") {
        return if writes { PinSet::of(PinReason::AdvisoryLock) } else { PinSet::NONE };
    }
    if starts(b"DROP ") || starts(b"DISCARD TEMP") {
        PinSet::of(PinReason::TemporaryTable)
    } else if starts(b"CLOSE CURSOR") {
        PinSet::of(PinReason::HoldCursor)
    } else if starts(b"UNLISTEN") {
        PinSet::of(PinReason::Listen)
    } else if starts(b"DEALLOCATE") {
        PinSet::of(PinReason::SqlPrepare)
    } else if starts(b"DO") || starts(b"CALL") {
        PinSet::SHOWN
    } else {
        PinSet::NONE
    }
}

/// What a unit has done, as far as it concerns the session's pins.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// What its statements leave behind.
    pub leaves: PinSet,
    /// Code ran in it that is not understood.
    pub unproven: bool,
    /// Code ran in it that sets something and may have committed that, also if it has failed then.
    pub commits_settings: bool,
    /// It was DISCARD ALL.
    pub discards_all: bool,
    /// What its commands may have ended.
    pub ends: PinSet,
    /// Commands that were completed.
    pub commands: u32,
    /// The only one was ROLLBACK.
    pub rollback: bool,
    /// The server has reported an error.
    pub failed: bool,
    /// The session has statements whose text only its backend knows.
    pub large_statements: bool,
    /// The transaction status before it.
    pub before: TransactionStatus,
    /// And after it.
    pub after: TransactionStatus,
}

impl Done {
    /// Whether all that its transaction had done was surely undone. Several commands may be several
    /// transactions: then nothing is sure.
    fn is_rolled_back(&self) -> bool {
        match self.before {
            TransactionStatus::Idle => self.failed && self.commands <= 1 && !self.commits_settings,
            TransactionStatus::InTransaction => {
                self.failed && self.commands == 0 || !self.failed && self.rollback
            }
            TransactionStatus::Failed => !self.failed && self.commands == 1,
        }
    }

    /// One command that succeeded, outside a transaction: what it leaves is there.
    fn is_certain(&self) -> bool {
        self.before == TransactionStatus::Idle && !self.failed && self.commands <= 1
    }
}

/// What is to be done after a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The transaction goes on, or the session is pinned.
    Stay,
    /// The backend is to be looked at: [`Pins::seen`].
    Look,
    /// Nothing of the session's is on the backend.
    Free,
}

/// The reasons for which a session is bound to its backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    now: PinSet,
    /// Of these: those that came up in the transaction which is underway.
    fresh: PinSet,
    /// May have ended in it.
    doubted: PinSet,
    /// Code ran in it that is not understood.
    unproven: bool,
}

impl Pins {
    /// The reasons now.
    pub fn now(&self) -> PinSet {
        self.now
    }

    /// Whether the session is bound.
    pub fn hold(&self) -> bool {
        !self.now.is_empty()
    }

    /// A reason has come up that is not undone with a transaction.
    pub fn keep(&mut self, reason: PinReason) {
        self.now |= PinSet::of(reason);
    }

    /// A reason comes up in the middle of a unit.
    pub fn add(&mut self, reason: PinReason) {
        let new = PinSet::of(reason).without(self.now);
        self.now |= new;
        self.fresh |= new;
    }

    /// A unit has been answered.
    pub fn after(&mut self, done: &Done) -> Next {
        if done.discards_all && !done.failed {
            *self = Pins { now: self.now.common(PinSet::LASTING), ..Pins::default() };
        }
        done.leaves.iter().for_each(|reason| self.add(reason));
        self.unproven |= done.unproven;
        self.doubted |= done.ends;
        // A call that locks may have been in vain, and one that unlocks is of the same class.
        self.doubted |= done.leaves.common(PinSet::of(PinReason::AdvisoryLock));
        if done.after != TransactionStatus::Idle {
            return Next::Stay;
        }
        self.transaction_over(done)
    }

    fn transaction_over(&mut self, done: &Done) -> Next {
        let Pins { fresh, doubted, unproven, .. } = *self;
        *self = Pins { now: self.now, ..Pins::default() };
        let undone = if done.is_rolled_back() { fresh.common(PinSet::UNDONE) } else { PinSet::NONE };
        self.now = self.now.without(undone);
        // It was code that has set it, and what else that has done may not be undone: a session's advisory lock.
        let unproven = unproven || !undone.is_empty();
        if !done.large_statements {
            self.now = self.now.without(PinSet::of(PinReason::LargeStatement));
        }
        // A temporary table may be gone with the very transaction that made it (ON COMMIT DROP).
        let on_commit = fresh.common(PinSet::of(PinReason::TemporaryTable));
        let doubted = doubted | if done.is_certain() { on_commit } else { fresh };
        if unproven || !self.now.common(doubted).common(PinSet::SHOWN).is_empty() {
            Next::Look
        } else if self.hold() {
            Next::Stay
        } else {
            Next::Free
        }
    }

    /// The backend was looked at: `shown` is there, and no other of the reasons that show.
    pub fn seen(&mut self, shown: PinSet) {
        self.now = self.now.without(PinSet::SHOWN) | shown;
    }
}

#[cfg(test)]
mod tests {
    use super::TransactionStatus::{Failed, Idle, InTransaction};
    use super::*;

    const TEMP: PinSet = PinSet::of(PinReason::TemporaryTable);
    const LISTEN: PinSet = PinSet::of(PinReason::Listen);
    const LOCK: PinSet = PinSet::of(PinReason::AdvisoryLock);
    const HOLD: PinSet = PinSet::of(PinReason::HoldCursor);
    const SETTING: PinSet = PinSet::of(PinReason::Setting);
    const PROCESS: PinSet = PinSet::of(PinReason::Process);

    /// One command outside a transaction that leaves `leaves`.
    fn done(leaves: PinSet) -> Done {
        Done {
            leaves,
            unproven: false,
            commits_settings: false,
            discards_all: false,
            ends: PinSet::NONE,
            commands: 1,
            rollback: false,
            failed: false,
            large_statements: true,
            before: Idle,
            after: Idle,
        }
    }

    fn failed(leaves: PinSet) -> Done {
        Done { failed: true, commands: 0, ..done(leaves) }
    }

    fn ended(tag: &[u8]) -> Done {
        Done { ends: ended_by(tag, false), ..done(PinSet::NONE) }
    }

    #[test]
    fn a_session_that_leaves_nothing_is_free() {
        assert_eq!(Pins::default().after(&done(PinSet::NONE)), Next::Free);
        assert_eq!(Pins::default().after(&failed(PinSet::NONE)), Next::Free);
    }

    #[test]
    fn what_one_command_leaves_is_believed_without_a_look() {
        for leaves in [LISTEN, HOLD, SETTING, PROCESS] {
            let mut pins = Pins::default();
            assert_eq!(pins.after(&done(leaves)), Next::Stay, "{leaves:?}");
            assert_eq!(pins.now(), leaves);
            assert_eq!(pins.after(&done(PinSet::NONE)), Next::Stay, "{leaves:?}");
        }
    }

    #[test]
    fn a_lock_is_looked_for_whenever_it_may_have_changed() {
        let mut pins = Pins::default();
        assert_eq!(pins.after(&done(LOCK)), Next::Look);
        pins.seen(LOCK);
        assert_eq!(pins.after(&done(PinSet::NONE)), Next::Stay);
        let all = Done { ends: ended_by(b"SELECT 1", true), ..done(PinSet::NONE) };
        assert_eq!(pins.after(&all), Next::Look);
        pins.seen(PinSet::NONE);
        assert!(!pins.hold());
    }

    #[test]
    fn the_command_that_ends_a_reason_is_followed_by_a_look() {
        for (leaves, tag) in [
            (TEMP, &b"DROP TABLE"[..]),
            (TEMP, b"DROP VIEW"),
            (TEMP, b"DISCARD TEMP"),
            (TEMP, b"DO"),
            (LISTEN, b"UNLISTEN"),
            (HOLD, b"CLOSE CURSOR"),
            (HOLD, b"CLOSE CURSOR ALL"),
            (PinSet::of(PinReason::SqlPrepare), b"DEALLOCATE"),
        ] {
            let mut pins = Pins::default();
            pins.after(&done(leaves));
            pins.seen(leaves);
            assert_eq!(pins.after(&ended(b"INSERT 0 1")), Next::Stay);
            assert_eq!(pins.after(&ended(tag)), Next::Look, "{}", tag.escape_ascii());
            pins.seen(PinSet::NONE);
            assert!(!pins.hold());
        }
        // Nor does a command ask about what the session has not.
        let mut pins = Pins::default();
        pins.after(&done(LISTEN));
        assert_eq!(pins.after(&ended(b"DROP TABLE")), Next::Stay);
    }

    #[test]
    fn in_a_transaction_the_look_waits_for_its_end() {
        let begun = Done { before: Idle, after: InTransaction, ..done(PinSet::NONE) };
        let inside = Done { before: InTransaction, after: InTransaction, ..done(LISTEN) };
        let over = Done { before: InTransaction, after: Idle, ..done(PinSet::NONE) };
        let mut pins = Pins::default();
        assert_eq!(pins.after(&begun), Next::Stay);
        assert_eq!(pins.after(&inside), Next::Stay);
        assert_eq!(pins.after(&over), Next::Look);
        pins.seen(LISTEN);
        // The next transaction has nothing to do with it.
        assert_eq!(pins.after(&begun), Next::Stay);
        assert_eq!(pins.after(&over), Next::Stay);
    }

    #[test]
    fn a_failed_statement_pins_only_by_what_is_seen() {
        let mut pins = Pins::default();
        assert_eq!(pins.after(&failed(TEMP)), Next::Look);
        pins.seen(PinSet::NONE);
        assert!(!pins.hold());
        // The setting is gone; a lock that the same code has taken is not.
        assert_eq!(pins.after(&failed(SETTING)), Next::Look);
        pins.seen(LOCK);
        assert_eq!(pins.now(), LOCK);
        pins.seen(PinSet::NONE);
        // Code that commits by itself has set it for good, perhaps.
        let mut sets = pins;
        assert_eq!(sets.after(&Done { commits_settings: true, ..failed(SETTING) }), Next::Stay);
        assert_eq!(sets.now(), SETTING);
        // Of these nobody can tell.
        assert_eq!(pins.after(&failed(PROCESS)), Next::Stay);
    }

    #[test]
    fn a_setting_goes_only_with_a_transaction_that_was_surely_rolled_back() {
        let set = Done { after: InTransaction, ..done(SETTING) };
        let check = |end: Done, gone: bool| {
            let mut pins = Pins::default();
            pins.after(&set);
            pins.after(&end);
            assert_eq!(pins.now().is_empty(), gone, "{end:?}");
        };
        let over = Done { before: InTransaction, ..done(PinSet::NONE) };
        check(over, false);
        check(Done { rollback: true, ..over }, true);
        check(Done { failed: true, commands: 0, ..over }, true);
        // COMMIT, and then something that failed.
        check(Done { failed: true, commands: 1, ..over }, false);
        check(Done { before: Failed, ..over }, true);
        check(Done { before: Failed, commands: 3, ..over }, false);
        // One that was set before stays.
        let mut pins = Pins::default();
        pins.after(&done(SETTING));
        pins.after(&set);
        pins.after(&Done { rollback: true, ..over });
        assert!(pins.hold());
    }

    #[test]
    fn discard_all_ends_all_but_what_lasts() {
        let discard = Done { discards_all: true, ..done(PinSet::NONE) };
        let mut pins = Pins::default();
        pins.after(&done(SETTING | HOLD | PinSet::of(PinReason::BackendPid)));
        assert_eq!(pins.after(&Done { failed: true, ..discard }), Next::Stay);
        assert_eq!(pins.after(&discard), Next::Free);
        pins.after(&done(PROCESS | LISTEN));
        assert_eq!(pins.after(&discard), Next::Stay);
        assert_eq!(pins.now(), PROCESS);
    }

    #[test]
    fn code_that_is_not_understood_is_looked_after_once() {
        let mut pins = Pins::default();
        assert_eq!(
            pins.after(&Done { unproven: true, after: InTransaction, ..done(PinSet::NONE) }),
            Next::Stay
        );
        let over = Done { before: InTransaction, ..done(PinSet::NONE) };
        assert_eq!(pins.after(&over), Next::Look);
        pins.seen(PinSet::NONE);
        assert_eq!(pins.after(&done(PinSet::NONE)), Next::Free);
    }

    #[test]
    fn a_large_statement_holds_while_it_has_a_name() {
        let mut pins = Pins::default();
        pins.add(PinReason::LargeStatement);
        assert_eq!(pins.after(&done(PinSet::NONE)), Next::Stay);
        assert_eq!(pins.after(&Done { large_statements: false, ..done(PinSet::NONE) }), Next::Free);
    }

    #[test]
    fn a_set_reads_back_as_it_was_written() {
        for reason in PinReason::ALL {
            let set = PinSet::of(reason);
            assert_eq!(PinSet::from_bits(set.bits()).iter().collect::<Vec<_>>(), [reason]);
        }
    }
}
