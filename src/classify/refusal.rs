//! What a replica's ErrorResponse says about running the statement again on the primary. Pure.
//!
//! An error counts by its SQLSTATE *and* the C function that raised it: a user's RAISE can carry any
//! SQLSTATE and any message, and must teach nothing. Messages are not looked at where a routine will do,
//! because the server may translate them.
//!
//! This is no safety net: a plpgsql handler swallows 25006. What may write never starts on a replica.
//! Whether a redo is still possible (nothing of the answer forwarded) is the caller's to know.

use crate::wire::ErrorFields;

/// What to do about a replica's error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A replica cannot run it at all: run it on the primary and remember it.
    NotAReadAfterAll,
    /// A replica that is behind may not know an object, a label, a right yet: run it on the primary when
    /// the replica was behind, and remember nothing.
    LateReplica,
    /// The replica's installation lacks what the statement takes (a library, a dictionary's file): run it on the primary and
    /// remember it.
    Installation,
    /// The replica cannot read its own files: run it on the primary, and remember nothing.
    Damage,
    /// Replay removed something the statement used: run it elsewhere.
    RecoveryConflict,
    /// The server is going down or not up yet: run it elsewhere.
    Shutdown,
    /// The statement's own error.
    None,
}

/// What a replica's error means.
pub fn of(fields: &ErrorFields<'_>) -> Refusal {
    if raised_by_a_user(fields.routine) {
        return Refusal::None;
    }
    match fields.sqlstate {
        b"25006" => match fields.routine {
            b"PreventCommandIfReadOnly" | b"PreventCommandDuringRecovery" => Refusal::NotAReadAfterAll,
            _ => Refusal::None,
        },
        b"0A000" => match fields.routine {
            // Unlogged relations; READ WRITE and SERIALIZABLE through a setting's check hook.
            b"get_relation_info"
            | b"call_bool_check_hook"
            | b"call_enum_check_hook"
            | b"GetSerializableTransactionSnapshot"
            | b"check_transaction_read_only"
            | b"check_XactIsoLevel"
            | b"check_transaction_isolation" => Refusal::NotAReadAfterAll,
            _ => Refusal::None,
        },
        b"55000" => match fields.routine {
            b"lastval" | b"currval_oid" | b"LockAcquireExtended" => Refusal::NotAReadAfterAll,
            // Many functions say "recovery is in progress", each in its own name.
            _ if fields.message == b"recovery is in progress" => Refusal::NotAReadAfterAll,
            _ => Refusal::None,
        },
        b"XX000" => match fields.routine {
            b"GetNewObjectId"
            | b"GetNewTransactionId"
            | b"AssignTransactionId"
            | b"GetNewMultiXactId"
            | b"XLogBeginInsert"
            | b"XLogInsert"
            | b"XLogInsertRecord" => Refusal::NotAReadAfterAll,
            // A library of another version, or another build's.
            b"internal_load_library" | b"incompatible_module_error" => Refusal::Installation,
            _ => Refusal::None,
        },
        // The system's own number of the error decides between these.
        b"58P01" | b"58030" | b"42501" | b"58000"
            if matches!(fields.routine, b"internal_load_library" | b"check_restricted_library_name") =>
        {
            Refusal::Installation
        }
        // Files that come with the installation, of text search.
        b"F0000" => match fields.routine {
            b"readstoplist"
            | b"dsynonym_init"
            | b"dxsyn_init"
            | b"thesaurusRead"
            | b"NIImportDictionary"
            | b"NIImportAffixes"
            | b"NIImportOOAffixes"
            | b"initTrie" => Refusal::Installation,
            _ => Refusal::None,
        },
        // Files of its own, a page that fails its checksum, an index that does not hold together.
        b"58P01" | b"58030" | b"XX001" | b"XX002" => Refusal::Damage,
        b"42P01" | b"42703" | b"42883" | b"42704" | b"3F000" | b"22P02" | b"42501" | b"42846" | b"22023" => {
            Refusal::LateReplica
        }
        b"40001" | b"40P01" | b"57P04" => match fields.routine {
            b"ProcessInterrupts"
            | b"ProcessRecoveryConflictInterrupt"
            | b"ProcessRecoveryConflictInterrupts"
            | b"CheckRecoveryConflictDeadlock"
            | b"report_recovery_conflict" => Refusal::RecoveryConflict,
            _ => Refusal::None,
        },
        b"57P01" | b"57P02" | b"57P03" => Refusal::Shutdown,
        _ => Refusal::None,
    }
}

/// Whether a backend says that its postmaster has died. It finds that out while it waits for its client: for a message,
/// perhaps the one after a COMMIT that it has carried out, or for room to answer. So nothing is said of the statement.
pub fn is_postmaster_gone(fields: &ErrorFields<'_>) -> bool {
    fields.sqlstate == b"57P01" && matches!(fields.routine, b"secure_read" | b"secure_write")
}

/// The routines through which procedural languages raise what a user wrote.
fn raised_by_a_user(routine: &[u8]) -> bool {
    routine.is_empty()
        || routine == b"exec_stmt_raise"
        || routine == b"exec_stmt_assert"
        || routine == b"throw_tcl_error"
        || routine.starts_with(b"PLy_")
        || routine.starts_with(b"plperl")
        || routine.starts_with(b"pltcl")
        || routine.starts_with(b"croak")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sqlstate: &str, message: &str, routine: &str, expected: Refusal) {
        let fields = ErrorFields {
            severity: b"ERROR",
            sqlstate: sqlstate.as_bytes(),
            message: message.as_bytes(),
            routine: routine.as_bytes(),
        };
        assert_eq!(of(&fields), expected, "{sqlstate} {message} {routine}");
    }

    /// As a 15.18 standby said them.
    #[test]
    fn a_replica_that_cannot() {
        for (sqlstate, message, routine) in [
            ("25006", "cannot execute nextval() in a read-only transaction", "PreventCommandIfReadOnly"),
            ("25006", "cannot execute NOTIFY during recovery", "PreventCommandDuringRecovery"),
            ("0A000", "cannot access temporary or unlogged relations during recovery", "get_relation_info"),
            ("0A000", "cannot set transaction read-write mode during recovery", "call_bool_check_hook"),
            ("0A000", "cannot use serializable mode in a hot standby", "call_enum_check_hook"),
            ("55000", "lastval is not yet defined in this session", "lastval"),
            ("55000", "currval of sequence \"sq\" is not yet defined in this session", "currval_oid"),
            ("55000", "recovery is in progress", "pg_current_wal_lsn"),
            ("55000", "recovery is in progress", "brin_summarize_range"),
            ("55000", "cannot acquire lock mode AccessExclusiveLock ...", "LockAcquireExtended"),
            ("XX000", "cannot assign OIDs during recovery", "GetNewObjectId"),
            ("XX000", "cannot assign TransactionIds during recovery", "GetNewTransactionId"),
        ] {
            check(sqlstate, message, routine, Refusal::NotAReadAfterAll);
        }
    }

    #[test]
    fn a_users_raise_teaches_nothing() {
        for sqlstate in
            ["25006", "0A000", "55000", "XX000", "42P01", "40001", "57P01", "58P01", "XX001", "F0000"]
        {
            check(sqlstate, "recovery is in progress", "exec_stmt_raise", Refusal::None);
            check(sqlstate, "recovery is in progress", "PLy_elog_impl", Refusal::None);
            check(sqlstate, "recovery is in progress", "", Refusal::None);
        }
    }

    #[test]
    fn a_replica_that_lacks_a_file_or_has_lost_one() {
        for (sqlstate, message, routine) in [
            (
                "58P01",
                "could not access file \"$libdir/postgis-3\": No such file or directory",
                "internal_load_library",
            ),
            ("42501", "could not access file \"x\": Permission denied", "internal_load_library"),
            ("XX000", "incompatible library \"x.so\": version mismatch", "incompatible_module_error"),
            ("F0000", "could not open stop-word file \"x.stop\": No such file or directory", "readstoplist"),
        ] {
            check(sqlstate, message, routine, Refusal::Installation);
        }
        for (sqlstate, message, routine) in [
            ("58P01", "could not open file \"base/1/2\": No such file or directory", "mdopenfork"),
            ("58030", "could not read block 0 in file \"base/1/2\": Input/output error", "mdread"),
            ("XX001", "invalid page in block 0 of relation base/1/2", "PageIsVerifiedExtended"),
            ("XX002", "left link changed unexpectedly", "_bt_walk_left"),
        ] {
            check(sqlstate, message, routine, Refusal::Damage);
        }
        check("F0000", "too many lexemes", "elsewhere", Refusal::None);
        check("42501", "permission denied for table t", "aclcheck_error", Refusal::LateReplica);
    }

    #[test]
    fn the_rest() {
        check("42P01", "relation \"nope\" does not exist", "parserOpenTable", Refusal::LateReplica);
        check("42883", "function nofunc() does not exist", "ParseFuncOrColumn", Refusal::LateReplica);
        check("22P02", "invalid input value for enum", "enum_in", Refusal::LateReplica);
        check(
            "40001",
            "canceling statement due to conflict with recovery",
            "ProcessInterrupts",
            Refusal::RecoveryConflict,
        );
        check("40001", "could not serialize access", "ExecUpdate", Refusal::None);
        check(
            "57P01",
            "terminating connection due to administrator command",
            "ProcessInterrupts",
            Refusal::Shutdown,
        );
        check("23505", "duplicate key", "_bt_check_unique", Refusal::None);
        check("57014", "canceling statement due to user request", "ProcessInterrupts", Refusal::None);
    }
}
