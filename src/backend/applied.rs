//! Which settings a backend has been given by the sessions that used it. A value; pure.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// A setting that differs from what the login gave.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Setting {
    /// In lower case.
    pub name: Box<str>,
    /// The statement that gives it its value; none: an application's own setting, reset, which the server
    /// knows by name only.
    pub sql: Option<Arc<str>>,
}

/// Settings in the order in which they were set last.
#[derive(Clone, Debug, Default, Eq)]
pub struct Applied {
    entries: Vec<Setting>,
    fingerprint: u64,
    parse: Box<[u8]>,
    keeps_on_primary: bool,
}

impl PartialEq for Applied {
    /// One comparison of numbers where they differ, or both are empty.
    fn eq(&self, other: &Applied) -> bool {
        self.fingerprint == other.fingerprint && self.entries == other.entries
    }
}

/// Settings that change nothing about where a read may run: a replica obeys them just as the primary does.
/// All others (`default_transaction_isolation`: a replica refuses serializable; `session_replication_role`;
/// what nobody has looked at) keep a session's reads on the primary. Those of applications (`app.tenant`)
/// are like these.
const SAFE_ON_REPLICAS: &[&str] = &[
    "application_name",
    "array_nulls",
    "backslash_quote",
    "bytea_output",
    "check_function_bodies",
    "client_encoding",
    "client_min_messages",
    "constraint_exclusion",
    "cpu_index_tuple_cost",
    "cpu_operator_cost",
    "cpu_tuple_cost",
    "cursor_tuple_fraction",
    "datestyle",
    "deadlock_timeout",
    "default_statistics_target",
    "default_text_search_config",
    "effective_cache_size",
    "effective_io_concurrency",
    "enable_async_append",
    "enable_bitmapscan",
    "enable_gathermerge",
    "enable_hashagg",
    "enable_hashjoin",
    "enable_incremental_sort",
    "enable_indexonlyscan",
    "enable_indexscan",
    "enable_material",
    "enable_memoize",
    "enable_mergejoin",
    "enable_nestloop",
    "enable_parallel_append",
    "enable_parallel_hash",
    "enable_partition_pruning",
    "enable_partitionwise_aggregate",
    "enable_partitionwise_join",
    "enable_seqscan",
    "enable_sort",
    "enable_tidscan",
    "escape_string_warning",
    "exit_on_error",
    "extra_float_digits",
    "from_collapse_limit",
    "geqo",
    "geqo_effort",
    "geqo_generations",
    "geqo_pool_size",
    "geqo_seed",
    "geqo_selection_bias",
    "geqo_threshold",
    "gin_fuzzy_search_limit",
    "hash_mem_multiplier",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "intervalstyle",
    "jit",
    "jit_above_cost",
    "jit_inline_above_cost",
    "jit_optimize_above_cost",
    "join_collapse_limit",
    "lc_messages",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "lock_timeout",
    "log_duration",
    "log_min_duration_statement",
    "log_min_messages",
    "log_statement",
    "logical_decoding_work_mem",
    "maintenance_work_mem",
    "max_parallel_maintenance_workers",
    "max_parallel_workers",
    "max_parallel_workers_per_gather",
    "max_stack_depth",
    "min_parallel_index_scan_size",
    "min_parallel_table_scan_size",
    "parallel_leader_participation",
    "parallel_setup_cost",
    "parallel_tuple_cost",
    "plan_cache_mode",
    "quote_all_identifiers",
    "random_page_cost",
    "recursive_worktable_factor",
    "role",
    "row_security",
    "search_path",
    "seq_page_cost",
    "session_authorization",
    "standard_conforming_strings",
    "statement_timeout",
    "synchronize_seqscans",
    "synchronous_commit",
    "tcp_keepalives_count",
    "tcp_keepalives_idle",
    "tcp_keepalives_interval",
    "tcp_user_timeout",
    "temp_file_limit",
    "timezone",
    "timezone_abbreviations",
    "transform_null_equals",
    "vacuum_cost_delay",
    "vacuum_cost_limit",
    "work_mem",
    "xmlbinary",
    "xmloption",
];

/// Settings that have no part in how a text is understood when it is parsed. All others do, or may.
const NO_PART_IN_PARSE: &[&str] = &[
    "application_name",
    "bytea_output",
    "client_min_messages",
    "deadlock_timeout",
    "extra_float_digits",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "log_statement",
    "log_min_duration_statement",
    "maintenance_work_mem",
    "plan_cache_mode",
    "statement_timeout",
    "synchronous_commit",
    "work_mem",
];

impl Applied {
    /// The settings, in the order in which they were set last.
    pub fn entries(&self) -> &[Setting] {
        &self.entries
    }

    /// One of them.
    pub fn entry(&self, name: &str) -> Option<&Setting> {
        self.entries.iter().find(|entry| *entry.name == *name)
    }

    /// Whether reads under these settings must run on the primary.
    pub fn keeps_on_primary(&self) -> bool {
        self.keeps_on_primary
    }

    /// What makes a difference to how a text is understood when it is parsed; empty: nothing of it.
    pub fn parse_fingerprint(&self) -> &[u8] {
        &self.parse
    }

    /// Bytes of all the statements.
    pub fn size(&self) -> usize {
        self.entries
            .iter()
            .map(|entry| entry.name.len() + entry.sql.as_ref().map_or(0, |sql| sql.len()))
            .sum()
    }

    /// A setting was set (or defined, without a value).
    pub fn put(&mut self, name: &str, sql: Option<Arc<str>>) {
        self.entries.retain(|entry| *entry.name != *name);
        self.entries.push(Setting { name: name.into(), sql });
        self.changed();
    }

    /// A setting has its default again.
    pub fn remove(&mut self, name: &str) {
        self.entries.retain(|entry| *entry.name != *name);
        self.changed();
    }

    fn changed(&mut self) {
        let valued = || self.entries.iter().filter(|entry| entry.sql.is_some());
        self.keeps_on_primary =
            valued().any(|entry| !entry.name.contains('.') && !SAFE_ON_REPLICAS.contains(&&*entry.name));
        let mut parse = Vec::new();
        // An application's own settings are read when a statement runs.
        for entry in
            valued().filter(|entry| !entry.name.contains('.') && !NO_PART_IN_PARSE.contains(&&*entry.name))
        {
            parse.extend_from_slice(entry.sql.as_deref().unwrap_or_default().as_bytes());
            parse.push(0);
        }
        self.parse = parse.into();
        self.fingerprint = if self.entries.is_empty() {
            0
        } else {
            let mut hasher = DefaultHasher::new();
            self.entries.hash(&mut hasher);
            hasher.finish()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_shown_safe_keeps_reads_on_the_primary() {
        let mut applied = Applied::default();
        for name in ["app.tenant", "timezone", "role", "search_path"] {
            applied.put(name, Some("x".into()));
            assert!(!applied.keeps_on_primary(), "{name}");
        }
        for name in [
            "default_transaction_isolation",
            "default_transaction_read_only",
            "session_replication_role",
            "never_heard_of",
        ] {
            applied.put(name, Some("x".into()));
            assert!(applied.keeps_on_primary(), "{name}");
            applied.remove(name);
            assert!(!applied.keeps_on_primary(), "{name}");
        }
    }

    #[test]
    fn only_what_parse_heeds_is_in_its_fingerprint() {
        let mut applied = Applied::default();
        applied.put("app.tenant", Some("SET app.tenant TO 1".into()));
        applied.put("work_mem", Some("SET work_mem TO 1".into()));
        assert_eq!(applied.parse_fingerprint(), b"");
        applied.put("timezone", Some("SET timezone TO UTC".into()));
        assert_eq!(applied.parse_fingerprint(), b"SET timezone TO UTC\0");
    }
}
