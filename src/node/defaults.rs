//! What the primary's own configuration gives a session that sets nothing: of which settings, and how a change is seen.

use std::collections::HashMap;
use std::time::Duration;

use crate::topology::{Epoch, NodeId};

use super::{LoginSettings, NodeError, Nodes, SETTINGS};

/// The settings by which a server answers a statement otherwise than another does, and that any role may set: how values
/// are read and written, what names mean, which rows are seen, which notices are heard. Not `lc_messages`, which takes a
/// superuser, nor what only plans, limits or logs.
pub const RESULT_SETTINGS: [&str; 22] = [
    "array_nulls",
    "backslash_quote",
    "bytea_output",
    "client_encoding",
    "client_min_messages",
    "DateStyle",
    "default_text_search_config",
    "extra_float_digits",
    "gin_fuzzy_search_limit",
    "IntervalStyle",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "quote_all_identifiers",
    "row_security",
    "search_path",
    "standard_conforming_strings",
    "TimeZone",
    "timezone_abbreviations",
    "transform_null_equals",
    "xmlbinary",
    "xmloption",
];

/// What of `options` would hide the server's own value.
const SEARCH_PATH: &str = "-c search_path=pg_catalog ";

const CONTENT: &str = "SELECT pg_catalog.hashtextextended(coalesce(pg_catalog.string_agg( \
    pg_catalog.concat(name, '=', reset_val), ';' ORDER BY name COLLATE pg_catalog.\"C\"), ''), 0) \
    FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) ANY ($1)";

/// Databases of which is known what the primary's configuration gives there. Beyond, all are forgotten, and that
/// counts as a change.
const MOST_DATABASES: usize = 1024;

/// By database, because the control user may have settings of its own in one: in which epoch, and a hash.
pub(super) type Contents = HashMap<Box<str>, (Epoch, i64)>;

impl LoginSettings {
    /// The primary of `epoch` gives `content` to sessions of `database`. A new primary has other connections anyway.
    fn read_configured(&self, database: &str, epoch: Epoch, content: i64) {
        let before = {
            let mut seen = self.seen();
            let overflows =
                seen.configured.len() >= MOST_DATABASES && !seen.configured.contains_key(database);
            if overflows {
                seen.configured.clear();
            }
            let before = seen.configured.insert(database.into(), (epoch, content));
            if overflows { Some((epoch, !content)) } else { before }
        };
        if before.is_some_and(|(of, before)| of == epoch && before != content) {
            self.changed();
        }
    }
}

impl Nodes {
    /// Looks whether the primary's configuration gives sessions of `database` something else than it did; if so, that
    /// counts as a change of what logins give. Over a connection of its own: those of ours have a `search_path`.
    pub async fn look_at_defaults(
        &self,
        primary: NodeId,
        epoch: Epoch,
        database: &str,
        deadline: Duration,
    ) -> Result<(), NodeError> {
        let mut settings = self.settings(primary, database)?;
        settings.options(SETTINGS.replace(SEARCH_PATH, ""));
        let (client, task) = self.dial(primary, &settings, deadline, None).await?;
        let _task = super::EndWithOwner(task);
        let row = tokio::time::timeout(deadline, client.query_one(CONTENT, &[&&RESULT_SETTINGS[..]]))
            .await
            .map_err(|_| self.late(primary))?
            .map_err(|error| self.error(primary, &error))?;
        let content = row.try_get(0).map_err(|error| self.error(primary, &error))?;
        self.login_settings.read_configured(database, epoch, content);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_without_our_search_path_has_the_servers() {
        assert!(SETTINGS.contains(SEARCH_PATH) && !SETTINGS.replace(SEARCH_PATH, "").contains("search_path"));
    }

    #[test]
    fn a_change_of_one_databases_defaults_counts_and_another_primary_does_not() {
        let settings = LoginSettings::default();
        settings.read_configured("a", Epoch(1), 7);
        settings.read_configured("b", Epoch(1), 8);
        settings.read_configured("a", Epoch(1), 7);
        assert_eq!(settings.generation(), 0);
        settings.read_configured("a", Epoch(1), 9);
        assert_eq!(settings.generation(), 1);
        settings.read_configured("a", Epoch(2), 7);
        assert_eq!(settings.generation(), 1);
    }

    #[test]
    fn more_databases_than_are_remembered_count_as_a_change() {
        let settings = LoginSettings::default();
        for database in 0..MOST_DATABASES {
            settings.read_configured(&database.to_string(), Epoch(1), 7);
        }
        assert_eq!(settings.generation(), 0);
        settings.read_configured("one more", Epoch(1), 7);
        assert_eq!(settings.generation(), 1);
    }
}
