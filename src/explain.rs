//! `highwater route`: what the classifier makes of one statement, and why; by built-in knowledge alone, or with the
//! catalog facts of a live database. Runs nothing of the statement.

use std::fmt;

use crate::catalogs;
use crate::classify::catalog::CatalogRows;
use crate::classify::{
    Catalog, Classifier, Kind, Leaves, Lexing, Lookup, Statement, StatementClass, Suspect,
};
use crate::config::live::LiveConfig;
use crate::config::{Config, LimitsConfig};
use crate::net::NodeTls;
use crate::node::Nodes;
use crate::topology::NodeId;

/// What there is to say of a statement.
#[derive(Debug)]
pub struct Explanation {
    class: StatementClass,
    suspects: Vec<Suspect>,
    /// Each node and its role, or why it did not answer; none without a configuration.
    nodes: Vec<(String, Result<bool, String>)>,
    database: Option<String>,
}

/// Explains `text` by built-in knowledge: a database without objects of users'.
pub async fn built_in(text: &str) -> Result<Explanation, String> {
    // The least configuration, for the limits' defaults.
    let config = "nodes: [ { name: none, host: localhost } ]\ncontrol: { user: nobody }\n";
    let config = Config::parse(config, "built in", &|_| None).map_err(|error| error.to_string())?;
    let rows = CatalogRows { server_major: 15, ..CatalogRows::default() };
    Ok(judge(text, &config.limits, &Catalog::from_rows(1, rows)).await)
}

/// Explains `text` with the facts of `database`, read from the node that is no standby.
pub async fn live(text: &str, config: Config, database: &str) -> Result<Explanation, String> {
    let tls = NodeTls::new(&config.node_tls).map_err(|error| error.to_string())?;
    let (limits, functions) = (config.limits.clone(), config.routing.functions.clone());
    let names: Vec<String> = config.nodes.iter().map(|node| node.name.clone()).collect();
    let nodes = Nodes::new(LiveConfig::new(config), &tls);
    let mut answers = Vec::new();
    let mut catalog = None;
    for (id, name) in (0u16..).map(NodeId).zip(names) {
        let mut client = match nodes.connect(id, database).await {
            Ok(client) => client,
            Err(error) => {
                answers.push((name, Err(error.cause)));
                continue;
            }
        };
        let question = "SELECT pg_catalog.pg_is_in_recovery(), \
                        pg_catalog.current_setting('server_version_num')::pg_catalog.int4";
        let standby = match client.query_one(question, &[]).await {
            Ok(row) => {
                let standby: bool = row.try_get(0).map_err(|error| error.to_string())?;
                let version: i32 = row.try_get(1).map_err(|error| error.to_string())?;
                if !standby && catalog.is_none() {
                    let major = u16::try_from(version / 10_000).unwrap_or_default();
                    let mut rows =
                        catalogs::load(&mut client, major).await.map_err(|error| error.to_string())?;
                    rows.overrides = functions.clone();
                    catalog = Some(Catalog::from_rows(1, rows));
                }
                Ok(standby)
            }
            Err(error) => Err(error.to_string()),
        };
        answers.push((name, standby));
    }
    let catalog = catalog.unwrap_or_else(|| Catalog::unknown(1));
    let explained = judge(text, &limits, &catalog).await;
    Ok(Explanation { nodes: answers, database: Some(database.to_owned()), ..explained })
}

async fn judge(text: &str, limits: &LimitsConfig, catalog: &Catalog) -> Explanation {
    let classifier = Classifier::new(limits);
    let statement = Statement { text: text.as_bytes(), parameter_types: &[], catalog, lexing: Lexing::Utf8 };
    let class = match classifier.lookup(&statement) {
        Lookup::Known(class, _) => class,
        Lookup::Ask(question) => classifier.ask(question).await,
    };
    let suspects = if class.kind == Kind::Read { Vec::new() } else { classifier.suspects(&statement) };
    Explanation { class, suspects, nodes: Vec::new(), database: None }
}

impl Explanation {
    fn leaves(&self) -> String {
        match self.class.leaves {
            Leaves::Nothing => "nothing".to_owned(),
            Leaves::Pins(reason) => {
                format!("session state ({}): the session keeps its backend", reason.label())
            }
            Leaves::Unproven => "perhaps something: the backend is looked at afterwards".to_owned(),
            Leaves::DiscardsAll => "nothing, and what was left before is gone".to_owned(),
            Leaves::DeallocatesAll => "nothing, and prepared statements are gone".to_owned(),
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (why, stage) = self.class.reason.explained();
        let kind = match self.class.kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Ddl => "ddl",
            Kind::TransactionControl => "transaction",
            Kind::Session => "session",
            Kind::Empty => "empty",
        };
        writeln!(f, "class       {kind}")?;
        writeln!(f, "because     {why}")?;
        for suspect in &self.suspects {
            writeln!(f, "            {}: {}", String::from_utf8_lossy(&suspect.what), suspect.why)?;
        }
        writeln!(f, "decided by  {stage}")?;
        writeln!(f, "leaves      {}", self.leaves())?;
        let reads = matches!(self.class.kind, Kind::Read | Kind::Empty);
        match &self.database {
            None => {
                let place = if reads { "a replica" } else { "the primary" };
                writeln!(f, "runs on     {place}, in a database without objects of users' (see --config)")?;
            }
            Some(database) => {
                writeln!(f, "database    {database}")?;
                for (name, answer) in &self.nodes {
                    let says = match answer {
                        Err(cause) => format!("no: {cause}"),
                        Ok(true) if reads => "yes, once it has reached the session's mark".to_owned(),
                        Ok(true) => "no: a standby".to_owned(),
                        Ok(false) if reads => "yes, where no replica may".to_owned(),
                        Ok(false) => "yes".to_owned(),
                    };
                    writeln!(f, "{name:<11} {says}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(text: &str) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(built_in(text)).unwrap().to_string()
    }

    #[test]
    fn what_it_is_why_and_where() {
        let read = explained("SELECT lower(x) FROM t");
        assert!(read.contains("class       read\n") && read.contains("runs on     a replica"), "{read}");
        let locks = explained("SELECT pg_advisory_lock(1), unknown(2) FROM t");
        assert!(
            locks.contains("class       write\n") && locks.contains("runs on     the primary"),
            "{locks}"
        );
        assert!(locks.contains("session state (advisory_lock)"), "{locks}");
        assert!(
            locks.contains("pg_advisory_lock: a built-in") && locks.contains("unknown: a function"),
            "{locks}"
        );
    }
}
