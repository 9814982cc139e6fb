//! What in the databases keeps reads on the primary: asks the primary for each database's catalog facts, as `run` does for
//! those that its clients use. Reads only.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::catalogs;
use crate::classify::advice::{self, Cure, KeptBack};
use crate::config::Config;
use crate::config::live::LiveConfig;
use crate::net::NodeTls;
use crate::node::Nodes;
use crate::topology::NodeId;

/// All databases together may take so long; `check` is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// Those that the control user may connect to, `$1` at most.
const DATABASES: &str = "SELECT d.datname::text FROM pg_catalog.pg_database d \
    WHERE d.datallowconn AND NOT d.datistemplate AND pg_catalog.has_database_privilege(d.oid, 'CONNECT') \
    ORDER BY d.datname LIMIT $1";

/// Asks the node of this name, the primary; one line for each thing that should be mended.
pub(super) async fn problems(
    config: &Config,
    tls: &NodeTls,
    primary: &str,
    progress: &mut dyn FnMut(&str),
) -> Vec<String> {
    let Some(index) = config.nodes.iter().position(|node| node.name == primary) else { return Vec::new() };
    if !config.routing.split {
        return Vec::new();
    }
    let nodes = Nodes::new(LiveConfig::new(config.clone()), tls);
    let deadline = Instant::now() + PATIENCE;
    let id = NodeId(index as u16);
    let databases = match timeout_at(deadline, databases(config, &nodes, id)).await {
        Ok(Ok(databases)) => databases,
        Ok(Err(cause)) => return vec![format!("node {primary}: its databases cannot be listed: {cause}")],
        Err(_) => {
            return vec![format!("node {primary}: its databases could not be listed within {PATIENCE:?}")];
        }
    };
    let mut found = Vec::new();
    for database in databases {
        match timeout_at(deadline, kept_back(config, &nodes, id, &database)).await {
            Ok(Ok(kept)) => found.extend(kept.iter().map(|kept| said(&database, kept))),
            Ok(Err(cause)) => found.push(format!("database {database}: its catalog cannot be read: {cause}")),
            Err(_) => {
                found.push(format!("database {database}: its catalog could not be read within {PATIENCE:?}"));
                break;
            }
        }
        progress(&format!("database {database} has been looked at"));
    }
    found
}

async fn databases(config: &Config, nodes: &Nodes, primary: NodeId) -> Result<Vec<String>, String> {
    let client = nodes.connect(primary, &config.control.database).await.map_err(|error| error.cause)?;
    let most = i64::try_from(config.limits.databases).unwrap_or(i64::MAX);
    let rows = client.query(DATABASES, &[&most]).await.map_err(|error| super::describe(&error))?;
    rows.iter().map(|row| row.try_get(0).map_err(|error| super::describe(&error))).collect()
}

async fn kept_back(
    config: &Config,
    nodes: &Nodes,
    primary: NodeId,
    database: &str,
) -> Result<Vec<KeptBack>, String> {
    let mut client = nodes.connect(primary, database).await.map_err(|error| error.cause)?;
    // Which major it is does not matter here: it is not compared with any other.
    let mut rows = catalogs::load(&mut client, 0).await.map_err(|error| super::describe(&error))?;
    rows.overrides = config.routing.functions.clone();
    Ok(advice::kept_back(rows))
}

/// One line.
fn said(database: &str, kept: &KeptBack) -> String {
    let what = match kept.operators.as_slice() {
        [] => "every statement runs on the primary, as any may run code that is not known".to_owned(),
        operators => format!(
            "reads with {} run on the primary, as that may run code that is not known",
            operators.join(" ")
        ),
    };
    let cure = match &kept.cure {
        Cure::Extensions(names) => format!(
            "of the extension{} {}; if what {} IMMUTABLE or STABLE only reads, list {} under routing.functions.extensions",
            if names.len() == 1 { "" } else { "s" },
            names.join(" and "),
            if names.len() == 1 { "it declares" } else { "they declare" },
            if names.len() == 1 { "it" } else { "them" },
        ),
        Cure::Functions(names) if names.is_empty() => {
            "; highwater route 'SQL' says more of a statement".to_owned()
        }
        Cure::Functions(names) => {
            format!("of {}; list under routing.functions.safe those that only read", names.join(", "))
        }
    };
    let space = if cure.starts_with(';') { "" } else { " " };
    format!("database {database}: {what}{space}{cure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_reads_back_is_said_with_its_cure() {
        let kept = |operators: &[&str], cure| KeptBack {
            operators: operators.iter().map(|token| (*token).to_owned()).collect(),
            cure,
        };
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        for (kept, expected) in [
            (
                kept(&["<", "="], Cure::Extensions(names(&["h3"]))),
                "database d: reads with < = run on the primary, as that may run code that is not known of the extension h3; if \
                 what it declares IMMUTABLE or STABLE only reads, list it under routing.functions.extensions",
            ),
            (
                kept(&[], Cure::Extensions(names(&["h3", "x"]))),
                "database d: every statement runs on the primary, as any may run code that is not known of the extensions h3 \
                 and x; if what they declare IMMUTABLE or STABLE only reads, list them under routing.functions.extensions",
            ),
            (
                kept(&["||"], Cure::Functions(names(&["app.f", "app.g"]))),
                "database d: reads with || run on the primary, as that may run code that is not known of app.f, app.g; list \
                 under routing.functions.safe those that only read",
            ),
            (
                kept(&[], Cure::Functions(Vec::new())),
                "database d: every statement runs on the primary, as any may run code that is not known; highwater route \
                 'SQL' says more of a statement",
            ),
        ] {
            assert_eq!(said("d", &kept), expected);
        }
    }
}
