//! `highwater route`: what the classifier makes of one statement, and why; by built-in knowledge alone, or with the
//! catalog facts of a live database. Runs nothing of the statement.

use std::fmt;

use crate::catalogs;
use crate::classify::catalog::CatalogRows;
use crate::classify::hint::Hints;
use crate::classify::{
    Catalog, Classifier, Kind, Leaves, Lexing, Lookup, Statement, StatementClass, Suspect,
};
use crate::config::live::LiveConfig;
use crate::config::{Config, LimitsConfig, Transactions};
use crate::consistency::{Promise, Route};
use crate::net::NodeTls;
use crate::node::Nodes;
use crate::topology::NodeId;
use crate::wal::Lsn;

/// What there is to say of a statement.
#[derive(Debug)]
pub struct Explanation {
    class: StatementClass,
    suspects: Vec<Suspect>,
    database: Option<(String, Rules)>,
    /// Each node and what it says; none without a configuration.
    pub nodes: Vec<(String, String)>,
    /// The mark of a session that begins now, where it is known.
    pub mark: Option<Lsn>,
}

/// What the configuration, and comments in a statement, say of a session's reads.
#[derive(Clone, Debug)]
pub struct Rules {
    user: String,
    promise: Promise,
    split: bool,
    shadow: bool,
    transactions: Transactions,
    hints: Hints,
}

impl Rules {
    /// For a statement with these hints, of a session of `user` in `database`.
    pub fn of(config: &Config, user: &str, database: &str, hints: Hints) -> Rules {
        let mut promise = config.consistency.promise_for(user, database);
        let split;
        (split, promise.route) = config.routing.for_session(user, database);
        let routing = &config.routing;
        Rules {
            user: user.to_owned(),
            promise: hints.says().over(promise),
            split,
            shadow: routing.shadow,
            transactions: routing.transactions,
            hints,
        }
    }

    /// Whether even a read runs there.
    pub fn keeps_reads_on_primary(&self) -> bool {
        !self.split || self.shadow || self.promise.route == Route::Primary
    }

    /// Where a read goes, and why.
    fn place_of_read(&self) -> &'static str {
        if !self.split {
            "the primary: routing.split is off for this user and database"
        } else if self.promise.route == Route::Primary {
            "the primary: highwater.route is primary"
        } else if self.shadow {
            "the primary: routing.shadow is on; without it, a replica"
        } else if self.promise.route == Route::Replica {
            "a replica, and it waits longer for one: highwater.route is replica"
        } else {
            "a replica that has reached the session's mark"
        }
    }

    fn promised(&self) -> String {
        let lag = self.promise.max_lag.map(|lag| format!(", at most {lag} behind")).unwrap_or_default();
        let hinted = match (self.hints.level, self.hints.route) {
            (None, None) => "",
            _ => " (by a comment in it)",
        };
        let (level, on_stale) = (self.promise.level, self.promise.on_stale.word());
        format!("level {level}{lag}, on_stale {on_stale}, route {}{hinted}", self.promise.route.word())
    }

    fn transactions(&self) -> &'static str {
        match self.transactions {
            Transactions::Primary => "the primary, whole",
            Transactions::Split => "at READ COMMITTED the same until its first statement that is no read",
        }
    }
}

/// Explains `text` by built-in knowledge: a database without objects of users'.
pub async fn built_in(text: &str) -> Result<Explanation, String> {
    // The least configuration, for the limits' defaults.
    let config = "nodes: [ { name: none, host: localhost } ]\ncontrol: { user: nobody }\n";
    let config = Config::parse(config, "built in", &|_| None).map_err(|error| error.to_string())?;
    let rows = CatalogRows { server_major: 15, ..CatalogRows::default() };
    Ok(judge(text, &config.limits, &Catalog::from_rows(1, rows)).await)
}

/// Explains `text` as a statement of `user` with the facts of `database`, read from the node that is no standby.
pub async fn live(text: &str, config: Config, user: &str, database: &str) -> Result<Explanation, String> {
    let tls = NodeTls::new(&config.node_tls).map_err(|error| error.to_string())?;
    let (limits, functions) = (config.limits.clone(), config.routing.functions.clone());
    let names: Vec<String> = config.nodes.iter().map(|node| node.name.clone()).collect();
    let nodes = Nodes::new(LiveConfig::new(config.clone()), &tls);
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
    let rules = Rules::of(&config, user, database, explained.class.hints);
    let reads = explained.class.is_read() && !rules.keeps_reads_on_primary();
    let says = |answer: Result<bool, String>| match answer {
        Err(cause) => format!("no: {cause}"),
        Ok(true) if reads => "yes, once it has reached the session's mark".to_owned(),
        Ok(true) => "no: a standby".to_owned(),
        Ok(false) if reads => "yes, where no replica may".to_owned(),
        Ok(false) => "yes".to_owned(),
    };
    let mut explained = explained.in_database(database, rules);
    explained.nodes = answers.into_iter().map(|(name, answer)| (name, says(answer))).collect();
    Ok(explained)
}

async fn judge(text: &str, limits: &LimitsConfig, catalog: &Catalog) -> Explanation {
    let classifier = Classifier::new(limits);
    let statement = Statement { text: text.as_bytes(), parameter_types: &[], catalog, lexing: Lexing::Utf8 };
    let class = match classifier.lookup(&statement) {
        Lookup::Known(class, _) => class,
        Lookup::Ask(question) => classifier.ask(question).await,
    };
    Explanation::new(class, classifier.suspects(&statement))
}

impl Explanation {
    /// Of a statement of this class; `suspects` are left out if it is a read.
    pub fn new(class: StatementClass, suspects: Vec<Suspect>) -> Explanation {
        let suspects = if class.kind == Kind::Read { Vec::new() } else { suspects };
        Explanation { class, suspects, database: None, nodes: Vec::new(), mark: None }
    }

    /// In this database, by these rules.
    pub fn in_database(self, database: &str, rules: Rules) -> Explanation {
        Explanation { database: Some((database.to_owned(), rules)), ..self }
    }

    fn leaves(&self) -> String {
        let leaves = self.class.leaves;
        let words = if !leaves.pins().is_empty() {
            let reasons: Vec<_> = leaves.pins().iter().map(|reason| reason.label()).collect();
            return format!("session state ({}): the session keeps its backend", reasons.join(", "));
        } else if leaves.has(Leaves::UNPROVEN) {
            "perhaps something: the backend is looked at afterwards"
        } else if leaves.has(Leaves::DISCARDS_ALL) {
            "nothing, and what was left before is gone"
        } else if leaves.has(Leaves::DEALLOCATES_ALL) {
            "nothing, and prepared statements are gone"
        } else if leaves.has(Leaves::SHOWS_STATEMENTS) {
            "nothing; it shows what the session has prepared"
        } else {
            "nothing"
        };
        words.to_owned()
    }

    fn place(&self) -> String {
        let reads = self.class.is_read();
        if self.class.hints.invalid {
            return "nowhere: a comment in it asks for what there is not (22023)".to_owned();
        }
        match &self.database {
            None => {
                let place = if reads { "a replica" } else { "the primary" };
                format!("{place}, in a database without objects of users' (see --config)")
            }
            Some(_) if !reads => "the primary".to_owned(),
            Some((_, rules)) => rules.place_of_read().to_owned(),
        }
    }

    /// All there is to say: what about, and what. Several lines about one thing follow each other; those behind the
    /// first have an empty word.
    pub fn facts(&self) -> Vec<(String, String)> {
        let (why, stage) = self.class.reason.explained();
        let kind = match self.class.shown() {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Ddl => "ddl",
            Kind::TransactionControl => "transaction",
            Kind::Session => "session",
            Kind::Empty => "empty",
        };
        let mut facts = vec![("class", kind.to_owned()), ("because", why.to_owned())];
        facts.extend(
            self.suspects
                .iter()
                .map(|suspect| ("", format!("{}: {}", String::from_utf8_lossy(&suspect.what), suspect.why))),
        );
        facts.push(("decided by", stage.to_owned()));
        facts.push(("leaves", self.leaves()));
        facts.push(("runs on", self.place()));
        if let Some((database, rules)) = &self.database {
            facts.push(("transaction", rules.transactions().to_owned()));
            facts.push(("database", database.clone()));
            facts.push(("user", rules.user.clone()));
            facts.push(("promised", rules.promised()));
        }
        facts.extend(self.mark.map(|mark| ("mark", format!("{mark}, of a session that begins now"))));
        let mut facts: Vec<_> = facts.into_iter().map(|(about, what)| (about.to_owned(), what)).collect();
        facts.extend(self.nodes.iter().cloned());
        facts
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (about, what) in self.facts() {
            writeln!(f, "{about:<11} {what}")?;
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
