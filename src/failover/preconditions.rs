//! What a node must grant and be set to before a failover may be trusted to work there, asked in advance.
//!
//! Promises: reads only; each finding names the statement or setting that mends it; what cannot be learned is an
//! error, not "fine". `auto` does not begin with a finding that [`Finding::refuses`]; the others are warnings.

use std::time::Duration;

use crate::config::Config;
use crate::failover::conninfo::Conninfo;
use crate::failover::orders::lock_holders;
use crate::node::{ControlSession, NodeError, NodeFailure, Nodes};
use crate::topology::NodeId;

/// Something that a failover would stumble over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is and what mends it, in a sentence.
    pub what: String,
    /// Whether a failover by itself is out of the question with it.
    pub refuses: bool,
}

/// What the failover is to be able to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// `durability: quorum`: standbys are known by their names.
    pub quorum: bool,
    /// `sync.manage`: `synchronous_standby_names` is changed while all is well.
    pub manage_sync: bool,
    /// `slots.manage`: so many slots are kept on each node.
    pub slots: Option<usize>,
}

const ROLES: &[&str] = &["pg_monitor", "pg_signal_backend"];
const FUNCTIONS: &[&str] = &[
    "pg_catalog.pg_read_file(text, bigint, bigint, boolean)",
    "pg_catalog.pg_promote(boolean, integer)",
    "pg_catalog.pg_reload_conf()",
    "pg_catalog.pg_wal_replay_resume()",
    "pg_catalog.pg_wal_replay_pause()",
];
const PARAMETERS: &[&str] = &[
    "primary_conninfo",
    "wal_receiver_status_interval",
    "recovery_min_apply_delay",
    "default_transaction_read_only",
    "synchronous_standby_names",
];

/// With `slots.manage` besides.
const SLOT: &str = "primary_slot_name";

/// Asks `node`. `identity` is the `application_name` of this proxy's own orders: another's lock is a finding;
/// `None`: the lock is not looked at.
pub async fn examine(
    config: &Config,
    nodes: &Nodes,
    node: NodeId,
    needs: Needs,
    identity: Option<&str>,
    deadline: Duration,
) -> Result<Vec<Finding>, NodeError> {
    let session = nodes.session(node, "highwater check", deadline).await?;
    let mut found = Vec::new();
    let version = one(&session, "SELECT current_setting('server_version_num')", deadline).await?;
    let superuser =
        one(&session, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user", deadline).await?;
    let parameters_can_be_granted = version.parse::<u32>().is_ok_and(|version| version >= 150_000);
    let missing = session.ask(&missing_grants(parameters_can_be_granted, needs), deadline).await?;
    found.extend(missing.into_iter().flatten().flatten().map(|grant| refusal(format!("it lacks: {grant}"))));
    if !parameters_can_be_granted && superuser != "t" {
        found.push(refusal(
            "ALTER SYSTEM takes a superuser before PostgreSQL 15: the role cannot give orders here"
                .to_owned(),
        ));
    }
    found.extend(settings(&session, needs, deadline).await?);
    if let Some(count) = needs.slots {
        found.extend(slots(&session, count, deadline).await?);
    }
    found.extend(upstream(config, node, needs, &session, deadline).await?);
    found.extend(names(config, &session, deadline).await?);
    if let Some(identity) = identity {
        found.extend(other_holder(identity, &session, deadline).await?);
    }
    Ok(found)
}

fn refusal(what: String) -> Finding {
    Finding { what, refuses: true }
}

fn warning(what: String) -> Finding {
    Finding { what, refuses: false }
}

/// A query whose rows are the statements that grant what is missing.
fn missing_grants(parameters: bool, needs: Needs) -> String {
    let mut rows = Vec::new();
    for role in ROLES {
        rows.push(format!("(pg_has_role('{role}', 'USAGE'), 'GRANT {role} TO ')"));
    }
    for function in FUNCTIONS {
        let held = format!("has_function_privilege('{function}', 'EXECUTE')");
        rows.push(format!("({held}, 'GRANT EXECUTE ON FUNCTION {function} TO ')"));
    }
    if parameters {
        for parameter in PARAMETERS.iter().chain(needs.slots.map(|_| &SLOT)) {
            let held = format!("has_parameter_privilege('{parameter}', 'ALTER SYSTEM')");
            rows.push(format!("({held}, 'GRANT ALTER SYSTEM ON PARAMETER {parameter} TO ')"));
        }
        if needs.manage_sync {
            rows.push("(pg_has_role('pg_checkpoint', 'USAGE'), 'GRANT pg_checkpoint TO ')".to_owned());
        }
    }
    format!(
        "SELECT grant_it || quote_ident(current_user) FROM (VALUES {}) AS needs (held, grant_it) WHERE NOT held",
        rows.join(", ")
    )
}

async fn settings(
    session: &ControlSession,
    needs: Needs,
    deadline: Duration,
) -> Result<Vec<Finding>, NodeError> {
    let mut found = Vec::new();
    let parameters = PARAMETERS.iter().chain(needs.slots.map(|_| &SLOT));
    let list: Vec<String> = parameters.map(|name| format!("'{name}'")).collect();
    let fixed = format!(
        "SELECT name, source FROM pg_settings WHERE name IN ({}) AND source IN ('command line', 'environment variable')",
        list.join(", ")
    );
    for row in session.ask(&fixed, deadline).await? {
        if let [Some(name), Some(source)] = row.as_slice() {
            found.push(refusal(format!(
                "{name} comes from the {source}, where ALTER SYSTEM has no effect on it"
            )));
        }
    }
    let general = "SELECT current_setting('wal_level'), current_setting('max_wal_senders'), \
                   current_setting('hot_standby'), current_setting('restore_command') <> '', \
                   coalesce(current_setting('allow_alter_system', true), 'on')";
    for row in session.ask(general, deadline).await? {
        let [Some(level), Some(senders), Some(hot), Some(archive), Some(alter)] = row.as_slice() else {
            continue;
        };
        if level == "minimal" {
            found.push(refusal(
                "wal_level is minimal: nobody can stream from it once it is the primary".to_owned(),
            ));
        }
        if senders == "0" {
            found.push(refusal(
                "max_wal_senders is 0: nobody can stream from it once it is the primary".to_owned(),
            ));
        }
        if hot == "off" {
            found.push(refusal("hot_standby is off: as a standby it answers no questions".to_owned()));
        }
        if archive == "t" {
            found.push(warning(
                "restore_command is set: cut off from its primary it may still advance from the archive, so no \
                 position of it is final and it cannot be a candidate"
                    .to_owned(),
            ));
        }
        if alter == "off" {
            found.push(refusal("allow_alter_system is off".to_owned()));
        }
    }
    Ok(found)
}

/// What it takes to keep `count` slots.
async fn slots(
    session: &ControlSession,
    count: usize,
    deadline: Duration,
) -> Result<Vec<Finding>, NodeError> {
    let question = "SELECT rolreplication OR rolsuper, quote_ident(rolname), \
        current_setting('max_replication_slots'), coalesce(current_setting('max_slot_wal_keep_size', true), '-1') \
        FROM pg_roles WHERE rolname = current_user";
    let mut found = Vec::new();
    for row in session.ask(question, deadline).await? {
        let [Some(replication), Some(role), Some(most), Some(kept)] = row.as_slice() else { continue };
        if replication != "t" {
            found.push(refusal(format!("it lacks: ALTER ROLE {role} REPLICATION (failover.slots.manage)")));
        }
        if most.parse::<usize>().is_ok_and(|most| most < count) {
            found.push(refusal(format!(
                "max_replication_slots is {most}, and failover.slots.manage keeps {count} on each node"
            )));
        }
        if kept == "-1" {
            found.push(warning(
                "max_slot_wal_keep_size is -1: the slot of a standby that stays away holds WAL until the disk is full"
                    .to_owned(),
            ));
        }
    }
    Ok(found)
}

/// How it follows, if it does. The connection string stays in here: it may hold a password.
async fn upstream(
    config: &Config,
    node: NodeId,
    needs: Needs,
    session: &ControlSession,
    deadline: Duration,
) -> Result<Vec<Finding>, NodeError> {
    let question = "SELECT pg_is_in_recovery(), CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') \
                    THEN current_setting('primary_conninfo') END, current_setting('cluster_name')";
    let rows = session.ask(question, deadline).await?;
    let Some([Some(recovery), Some(text), Some(cluster)]) = rows.first().map(Vec::as_slice) else {
        // Without pg_monitor it may not be seen, which is a finding already.
        return Ok(Vec::new());
    };
    if recovery != "t" || text.is_empty() {
        return Ok(Vec::new());
    }
    let Ok(conninfo) = Conninfo::parse(text) else {
        return Ok(vec![refusal("its primary_conninfo cannot be read".to_owned())]);
    };
    let fallback = if cluster.is_empty() { "walreceiver" } else { cluster };
    let shown = conninfo.get("application_name").unwrap_or(fallback);
    let expected = config.nodes.get(node.index()).map_or("", |node| node.name.as_str());
    let finding = format!(
        "it streams as `{shown}`, not as `{expected}`: primary_conninfo must hold application_name={expected} for \
         synchronous_standby_names to mean this node"
    );
    Ok(match (shown == expected, needs.quorum || needs.manage_sync) {
        (true, _) => Vec::new(),
        (false, true) => vec![refusal(finding)],
        (false, false) => vec![warning(finding)],
    })
}

async fn names(
    config: &Config,
    session: &ControlSession,
    deadline: Duration,
) -> Result<Vec<Finding>, NodeError> {
    let value = one(session, "SELECT current_setting('synchronous_standby_names')", deadline).await?;
    let mut found = Vec::new();
    let mut seen: Vec<String> = Vec::new();
    for name in standby_names(&value) {
        if name == "*" {
            found.push(refusal(
                "synchronous_standby_names has `*`: anybody may acknowledge commits".to_owned(),
            ));
        } else if !config.nodes.iter().any(|node| node.name == name) {
            found.push(refusal(format!("synchronous_standby_names has `{name}`, which is no node")));
        } else if seen.contains(&name) {
            found.push(refusal(format!("synchronous_standby_names has `{name}` twice")));
        }
        seen.push(name);
    }
    Ok(found)
}

/// The names in a `synchronous_standby_names`, in each of its forms.
fn standby_names(value: &str) -> Vec<String> {
    let list = match (value.find('('), value.rfind(')')) {
        (Some(from), Some(to)) if from < to => &value[from + 1..to],
        _ => value,
    };
    let name = |text: &str| text.trim().trim_matches('"').replace("\"\"", "\"");
    list.split(',').map(name).filter(|name| !name.is_empty()).collect()
}

async fn other_holder(
    identity: &str,
    session: &ControlSession,
    deadline: Duration,
) -> Result<Vec<Finding>, NodeError> {
    let rows = session.ask(&lock_holders("a.application_name"), deadline).await?;
    let others =
        rows.into_iter().filter_map(|row| row.into_iter().next().flatten()).filter(|name| name != identity);
    Ok(others
        .map(|name| {
            refusal(format!(
                "the control lock is held by `{name}`: another highwater gives orders here, and only one may"
            ))
        })
        .collect())
}

async fn one(session: &ControlSession, question: &str, deadline: Duration) -> Result<String, NodeError> {
    let rows = session.ask(question, deadline).await?;
    rows.into_iter().flatten().flatten().next().ok_or_else(|| NodeError {
        node: String::new(),
        cause: "its answer cannot be read".to_owned(),
        kind: NodeFailure::Answered,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_synchronous_standby_names_is_read() {
        for (value, names) in [
            ("", vec![]),
            ("b", vec!["b"]),
            ("b, c", vec!["b", "c"]),
            ("2 (b, c)", vec!["b", "c"]),
            ("FIRST 1 (b,\"c\")", vec!["b", "c"]),
            ("ANY 1 (\"b\", \"c d\")", vec!["b", "c d"]),
            ("*", vec!["*"]),
            ("ANY 1 (*)", vec!["*"]),
        ] {
            assert_eq!(standby_names(value), names, "{value}");
        }
    }
}
