//! `highwater check`: asks every node what it is, and says in plain words where statements would go.
//!
//! Promises: reads only; all nodes are asked at once, each with one connection and one deadline, and of the primary each
//! database what in it keeps reads back (`databases`); whatever would keep the proxy from working well is one line of
//! [`Report::problems`]. Deliberately does not start
//! anything or judge performance. It connects with the TLS that `run` connects with.

mod databases;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use tokio_postgres::Client;

use crate::config::coordination::CoordinationConfig;
use crate::config::live::LiveConfig;
use crate::config::{AuthSource, Config, DurabilityMode, FailoverMode, NodeConfig, Transactions};
use crate::etcd::Etcd;
use crate::failover::preconditions::{self, Finding, Needs};
use crate::net::{ClientTls, NodeTls};
use crate::node::{Nodes, RESULT_SETTINGS};
use crate::topology::NodeId;
use crate::wal::Lsn;

/// What `check` found. `Display` prints all of it, for people.
#[derive(Clone, Debug)]
pub struct Report {
    /// What each node answered, in the configuration's order; the error says why it did not.
    pub nodes: Vec<(String, Result<NodeFacts, String>)>,
    /// What should be mended, one sentence each; empty: all is well.
    pub problems: Vec<String>,
    /// The effective routing, one sentence each.
    pub routing: Vec<String>,
}

/// What one node said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// Whether it replays another server's WAL.
    pub in_recovery: bool,
    /// The cluster's identity.
    pub system_identifier: String,
    /// The timeline it writes, or receives.
    pub timeline: i32,
    /// For example `15.14`.
    pub server_version: String,
    /// For example 15.
    pub server_major: i32,
    /// Insert position of a primary, replay position of a replica.
    pub lsn: Option<Lsn>,
    /// Whether the control user has the rights of `pg_monitor`.
    pub may_monitor: bool,
    /// Whether it may read the files in which timelines tell where they began.
    pub may_read_history: bool,
    /// The server's `password_encryption`.
    pub password_encryption: String,
    /// Whether the server offers TLS.
    pub offers_tls: bool,
    /// The TLS version that this connection has; `None`: it has none.
    pub tls_version: Option<String>,
    /// Roles that may log in and have an md5 verifier; `None`: the control user may not see them.
    pub md5_roles: Option<i64>,
    /// Whether the auth query works for the control user; `None`: not tried.
    pub auth_query: Option<Result<(), String>>,
    /// The defaults of settings by which a server answers otherwise than another.
    pub settings: BTreeMap<String, String>,
    /// What a failover by this proxy would stumble over; nothing where somebody else does it.
    pub failover: Vec<Finding>,
}

const FACTS: &str = "SELECT pg_is_in_recovery(), \
    (SELECT system_identifier::text FROM pg_control_system()), \
    CASE WHEN pg_is_in_recovery() \
         THEN COALESCE((SELECT received_tli FROM pg_stat_wal_receiver), \
                       (SELECT timeline_id FROM pg_control_checkpoint())) \
         ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END, \
    current_setting('server_version'), current_setting('server_version_num')::int / 10000, \
    CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
         ELSE pg_current_wal_insert_lsn() END::text, \
    pg_has_role('pg_monitor', 'USAGE'), current_setting('password_encryption'), \
    current_setting('ssl') = 'on', \
    (SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()), \
    has_function_privilege('pg_catalog.pg_read_file(text, bigint, bigint, boolean)', 'EXECUTE')";

/// What a session that sets none of these has: how values are written and read, what names mean, which rows are seen.
const SETTINGS: &str = "SELECT name, coalesce(reset_val, '') FROM pg_catalog.pg_settings WHERE name IN ('TimeZone', \
    'timezone_abbreviations', 'DateStyle', 'IntervalStyle', 'bytea_output', 'extra_float_digits', 'xmlbinary', 'xmloption', \
    'lc_messages', 'lc_monetary', 'lc_numeric', 'lc_time', 'default_text_search_config', 'search_path', \
    'standard_conforming_strings', 'backslash_quote', 'array_nulls', 'transform_null_equals', 'quote_all_identifiers', \
    'row_security', 'gin_fuzzy_search_limit', 'default_transaction_isolation', 'pg_trgm.similarity_threshold', \
    'pg_trgm.word_similarity_threshold', 'pg_trgm.strict_word_similarity_threshold')";

const MD5_ROLES: &str =
    "SELECT count(*) FROM pg_catalog.pg_authid WHERE rolcanlogin AND rolpassword LIKE 'md5%'";

/// Asks the nodes; returns after at most `pool.connect_timeout` plus `failover.check_timeout` plus what `databases` takes,
/// about.
/// Must run on a tokio runtime. `progress` hears of each answer as it comes.
pub async fn check(config: &Config, progress: &mut dyn FnMut(&str)) -> Report {
    let tls = match NodeTls::new(&config.node_tls) {
        Ok(tls) => tls,
        Err(error) => return unusable(config, error.to_string()),
    };
    let mut asking = tokio::task::JoinSet::new();
    for (index, node) in config.nodes.iter().enumerate() {
        let (config, node, tls) = (config.clone(), node.clone(), tls.clone());
        asking.spawn(async move { (index, ask(&config, &node, &tls).await) });
    }
    let unanswered = || Err("the question ended early".to_owned());
    let mut nodes: Vec<_> = config.nodes.iter().map(|n| (n.name.clone(), unanswered())).collect();
    while let Some(done) = asking.join_next().await {
        if let Ok((index, answer)) = done {
            let how = if answer.is_ok() { "has answered" } else { "has not answered" };
            progress(&format!("node {} {how}", nodes[index].0));
            nodes[index].1 = answer;
        }
    }
    let mut problems = problems(config, &nodes);
    problems.extend(etcd_problems(config).await);
    if let [primary] = primaries(&nodes).as_slice() {
        problems.extend(databases::problems(config, &tls, primary, progress).await);
    }
    Report { problems, routing: routing(config, &nodes), nodes }
}

/// Each member of etcd that does not answer.
async fn etcd_problems(config: &Config) -> Vec<String> {
    let mut found = Vec::new();
    let Some(several) = &config.failover.coordination else { return found };
    for endpoint in &several.endpoints {
        let one = CoordinationConfig { endpoints: vec![endpoint.clone()], ..several.clone() };
        match Etcd::new(&one) {
            Ok(etcd) => found.extend(etcd.range(&several.prefix).await.err().map(|error| error.to_string())),
            Err(error) => found.push(error.to_string()),
        }
    }
    found
}

/// What there is to say when node_tls cannot even be set up: `run` would not start.
fn unusable(config: &Config, why: String) -> Report {
    let nodes = config.nodes.iter().map(|n| (n.name.clone(), Err("not tried".to_owned()))).collect();
    let mut problems = vec![format!("node_tls cannot be used: {why}")];
    problems.extend(client_tls_problem(config));
    Report { nodes, problems, routing: vec!["None: the proxy would not start.".to_owned()] }
}

async fn ask(config: &Config, node: &NodeConfig, tls: &NodeTls) -> Result<NodeFacts, String> {
    let deadline = config.pool.connect_timeout + config.failover.check_timeout;
    match tokio::time::timeout(deadline, connect_and_ask(config, node, tls)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {deadline:?}")),
    }
}

async fn connect_and_ask(config: &Config, node: &NodeConfig, tls: &NodeTls) -> Result<NodeFacts, String> {
    let (connector, mode) = tls.postgres_connector();
    let mut options = tokio_postgres::Config::new();
    options
        .host(&node.host)
        .port(node.port)
        .user(&config.control.user)
        .dbname(&config.control.database)
        .application_name("highwater check")
        .ssl_mode(mode)
        .connect_timeout(config.pool.connect_timeout);
    if let Some(password) = &config.control.password {
        options.password(&password.0);
    }
    let (client, connection) = options.connect(connector).await.map_err(|e| describe(&e))?;
    // Ends by itself when `client` is dropped.
    tokio::spawn(connection);
    let mut facts = facts(config, &client).await.map_err(|e| describe(&e))?;
    if gives_orders(config.failover.mode) {
        facts.failover = failover_findings(config, node, tls).await?;
    }
    Ok(facts)
}

fn gives_orders(mode: FailoverMode) -> bool {
    !matches!(mode, FailoverMode::Off | FailoverMode::Follow)
}

async fn failover_findings(
    config: &Config,
    node: &NodeConfig,
    tls: &NodeTls,
) -> Result<Vec<Finding>, String> {
    let Some(index) = config.nodes.iter().position(|other| other.name == node.name) else {
        return Ok(Vec::new());
    };
    let config = Arc::new(config.clone());
    let nodes = Nodes::new(LiveConfig::new(Config::clone(&config)), tls);
    let deadline = config.failover.check_timeout;
    let id = NodeId(index as u16);
    let needs = Needs {
        quorum: config.failover.durability == DurabilityMode::Quorum,
        manage_sync: config.failover.sync.manage,
        slots: config.slots_kept(),
    };
    preconditions::examine(&config, &nodes, id, needs, None, deadline).await.map_err(|error| error.cause)
}

async fn facts(config: &Config, client: &Client) -> Result<NodeFacts, tokio_postgres::Error> {
    let row = client.query_one(FACTS, &[]).await?;
    let lsn: Option<&str> = row.try_get(5)?;
    let settings = client.query(SETTINGS, &[]).await?;
    let settings = settings.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    // Only a superuser may look; for others it stays unknown.
    let md5_roles = match client.query_one(MD5_ROLES, &[]).await {
        Ok(row) => row.try_get(0).ok(),
        Err(_) => None,
    };
    Ok(NodeFacts {
        in_recovery: row.try_get(0)?,
        system_identifier: row.try_get(1)?,
        timeline: row.try_get(2)?,
        server_version: row.try_get(3)?,
        server_major: row.try_get(4)?,
        lsn: lsn.and_then(|text| text.parse().ok()),
        may_monitor: row.try_get(6)?,
        password_encryption: row.try_get(7)?,
        offers_tls: row.try_get(8)?,
        tls_version: row.try_get(9)?,
        may_read_history: row.try_get(10)?,
        md5_roles,
        auth_query: match config.auth.source {
            AuthSource::List => None,
            AuthSource::Query => Some(try_auth_query(config, client).await),
        },
        settings: settings.collect::<Result<_, tokio_postgres::Error>>()?,
        failover: Vec::new(),
    })
}

async fn try_auth_query(config: &Config, client: &Client) -> Result<(), String> {
    use tokio_postgres::types::Type;
    let statement = client.prepare(&config.auth.query).await.map_err(|e| describe(&e))?;
    let text = |t: &Type| [Type::TEXT, Type::NAME, Type::VARCHAR].contains(t);
    if statement.params().len() != 2 || !statement.params().iter().all(text) {
        return Err("it must take two text parameters, $1 the user and $2 the database".to_owned());
    }
    let types: Vec<&Type> = statement.columns().iter().map(|c| c.type_()).collect();
    let shape = matches!(types.as_slice(), [verifier, login, until, connect]
        if text(verifier) && **login == Type::BOOL && **until == Type::TIMESTAMPTZ && **connect == Type::BOOL);
    if !shape {
        return Err("it must answer four columns: text, boolean, timestamptz, boolean".to_owned());
    }
    let (user, database) = (&config.control.user, &config.control.database);
    client.query(&statement, &[user, database]).await.map(|_| ()).map_err(|e| describe(&e))
}

/// The server's own words where there are some; the crate's `Display` says only `db error`.
fn describe(e: &tokio_postgres::Error) -> String {
    if let Some(db) = e.as_db_error() {
        return format!("{} ({})", db.message(), db.code().code());
    }
    match std::error::Error::source(e) {
        Some(cause) => format!("{e}: {cause}"),
        None => e.to_string(),
    }
}

type Answers = [(String, Result<NodeFacts, String>)];

fn answered(nodes: &Answers) -> impl Iterator<Item = (&str, &NodeFacts)> {
    nodes.iter().filter_map(|(name, answer)| Some((name.as_str(), answer.as_ref().ok()?)))
}

fn primaries(nodes: &Answers) -> Vec<&str> {
    answered(nodes).filter(|(_, f)| !f.in_recovery).map(|(name, _)| name).collect()
}

/// Where a node is looked for.
fn address(config: &Config, name: &str) -> String {
    let node = config.nodes.iter().find(|node| node.name == name);
    node.map_or_else(String::new, |node| format!("{}:{}", node.host, node.port))
}

fn problems(config: &Config, nodes: &Answers) -> Vec<String> {
    let mut found = Vec::new();
    for (name, answer) in nodes {
        match answer {
            Err(why) => found.push(format!("node {name} ({}) cannot be used: {why}", address(config, name))),
            Ok(facts) => node_problems(config, name, facts, &mut found),
        }
    }
    found.extend(client_tls_problem(config));
    found.extend(zone_problem(config, nodes));
    match primaries(nodes).as_slice() {
        [] => found.push("no node that answers is a primary: nothing can be written".to_owned()),
        [_] => {}
        several => found.push(format!("several nodes accept writes: {}", several.join(", "))),
    }
    differing("system identifiers", nodes, |f| f.system_identifier.clone(), &mut found);
    differing("timelines", nodes, |f| f.timeline.to_string(), &mut found);
    differing("major versions", nodes, |f| f.server_major.to_string(), &mut found);
    other_defaults(nodes, &mut found);
    found
}

/// Nobody would take over from the primary by itself, for all who may be promoted are in other zones.
fn zone_problem(config: &Config, nodes: &Answers) -> Option<String> {
    let failover = &config.failover;
    let [primary] = primaries(nodes)[..] else { return None };
    if !gives_orders(failover.mode) || !failover.same_zone_only {
        return None;
    }
    let known = || config.nodes.iter().filter(|node| !node.removed);
    let zone = &known().find(|node| node.name == primary)?.zone;
    let mut candidates =
        known().filter(|node| node.name != primary && failover.priority_of(&node.name) > 0).peekable();
    candidates.peek()?;
    if candidates.any(|node| node.zone == *zone) {
        return None;
    }
    let zone = zone.as_ref().map_or("no zone".to_owned(), |zone| format!("zone {zone}"));
    Some(format!(
        "node {primary}: it is in {zone}, and none of those who may be promoted is: if it is lost, nobody takes over \
         until a command names who (failover.same_zone_only: false lets other zones take over)"
    ))
}

fn client_tls_problem(config: &Config) -> Option<String> {
    ClientTls::new(&config.client_tls).err().map(|error| format!("client_tls cannot be used: {error}"))
}

fn node_problems(config: &Config, name: &str, facts: &NodeFacts, found: &mut Vec<String>) {
    let user = &config.control.user;
    if !facts.may_monitor {
        found.push(format!("node {name}: role {user} lacks pg_monitor (GRANT pg_monitor TO {user})"));
    }
    if !facts.may_read_history {
        found.push(format!(
            "node {name}: role {user} may not execute pg_read_file: after a failover no session can be told \
             that nothing of its was lost (docs/OPERATIONS.md has the grant)"
        ));
    }
    if let Some(Err(why)) = &facts.auth_query {
        found.push(format!("node {name}: auth.query fails for role {user}: {why}"));
    }
    found.extend(facts.failover.iter().map(|finding| {
        let refused = if finding.refuses { "a failover would be refused" } else { "a failover may suffer" };
        format!("node {name}: {refused}: {}", finding.what)
    }));
    if facts.password_encryption != "scram-sha-256" {
        let setting = &facts.password_encryption;
        found.push(format!("node {name}: password_encryption is {setting}; logins need scram-sha-256"));
    }
    if let Some(count @ 1..) = facts.md5_roles {
        found.push(format!(
            "node {name}: {count} roles have md5 verifiers and cannot log in until they set \
                            their password anew"
        ));
    }
}

fn differing(what: &str, nodes: &Answers, of: fn(&NodeFacts) -> String, found: &mut Vec<String>) {
    let values: Vec<_> = answered(nodes).map(|(name, facts)| (name, of(facts))).collect();
    if values.iter().any(|(_, value)| *value != values[0].1) {
        let list: Vec<_> = values.iter().map(|(name, value)| format!("{name} {value}")).collect();
        found.push(format!("the nodes' {what} differ: {}", list.join(", ")));
    }
}

/// Replicas whose own configuration makes them answer otherwise than the primary.
fn other_defaults(nodes: &Answers, found: &mut Vec<String>) {
    let mut primaries = answered(nodes).filter(|(_, facts)| !facts.in_recovery);
    let (Some((primary, first)), None) = (primaries.next(), primaries.next()) else { return };
    for (name, replica) in answered(nodes).filter(|(_, facts)| facts.in_recovery) {
        let other = |(setting, value): (&String, &String)| {
            let here = first.settings.get(setting).filter(|here| *here != value)?;
            let given = RESULT_SETTINGS.contains(&setting.as_str());
            Some((given, format!("{setting} {value} ({primary}: {here})")))
        };
        let others: Vec<_> = replica.settings.iter().filter_map(other).collect();
        let what_of = [
            (
                true,
                "they hold once it is the primary; until then sessions are given the primary's there, too",
            ),
            (false, "sessions that do not set them get other answers there"),
        ];
        for (given, what) in what_of {
            let of_these = others.iter().filter(|(its, _)| *its == given);
            let list: Vec<_> = of_these.map(|(_, other)| other.as_str()).collect();
            if !list.is_empty() {
                found.push(format!(
                    "node {name}: other defaults than the primary's: {}: {what}",
                    list.join(", ")
                ));
            }
        }
    }
}

fn routing(config: &Config, nodes: &Answers) -> Vec<String> {
    let mut lines = Vec::new();
    let primaries = primaries(nodes);
    let primary = match primaries.as_slice() {
        [] => {
            let wait = config.failover.pause_timeout;
            lines.push(format!(
                "Statements for the primary wait up to {wait:?} for one to be found, then fail."
            ));
            None
        }
        [one] => {
            let transactions = match config.routing.transactions {
                Transactions::Primary => "explicit transactions",
                Transactions::Split => "explicit transactions that do more than read at READ COMMITTED",
            };
            lines.push(format!("Writes, {transactions} and all that is unclear go to {one}."));
            Some(*one)
        }
        several => {
            lines.push(format!("Writes go to one of {}, whichever is found first.", several.join(", ")));
            None
        }
    };
    let reference = primary.and_then(|p| answered(nodes).find(|(name, _)| *name == p)).map(|(_, f)| f);
    let serving: Vec<&str> = answered(nodes)
        .filter(|(name, f)| f.in_recovery && config.nodes.iter().any(|n| n.name == *name && n.weight > 0))
        .filter(|(_, f)| reference.is_none_or(|p| same_history(p, f)))
        .map(|(name, _)| name)
        .collect();
    if !config.routing.split {
        lines.push("Reads go to the primary too: routing.split is false.".to_owned());
    } else if serving.is_empty() {
        lines.push("Reads go to the primary too: no replica can serve.".to_owned());
    } else {
        let (lag, wait) = (config.consistency.max_lag, config.consistency.catch_up_wait);
        lines.push(format!(
            "Reads go to {}, while its lag is at most {lag:?} and it has reached the session's mark; after \
             {wait:?} of waiting for that, to the primary.",
            serving.join(" or ")
        ));
    }
    lines
}

fn same_history(primary: &NodeFacts, replica: &NodeFacts) -> bool {
    primary.system_identifier == replica.system_identifier && primary.timeline == replica.timeline
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = answered(&self.nodes).filter(|(_, n)| !n.in_recovery).find_map(|(_, n)| n.lsn);
        for (name, answer) in &self.nodes {
            let facts = match answer {
                Err(why) => {
                    writeln!(f, "node {name}: unreachable: {why}")?;
                    continue;
                }
                Ok(facts) => facts,
            };
            let role = if facts.in_recovery { "replica" } else { "primary" };
            write!(f, "node {name}: {role}, PostgreSQL {}", facts.server_version)?;
            write!(f, ", timeline {}, system {}", facts.timeline, facts.system_identifier)?;
            if let (true, Some(head), Some(replayed)) = (facts.in_recovery, head, facts.lsn) {
                write!(f, ", {} bytes behind", head.bytes_since(replayed))?;
            }
            let tls = match (&facts.tls_version, facts.offers_tls) {
                (Some(version), _) => version.trim_start_matches("TLSv").to_owned(),
                (None, true) => "offered, not used".to_owned(),
                (None, false) => "not offered".to_owned(),
            };
            let monitor = if facts.may_monitor { "yes" } else { "no" };
            let query = match &facts.auth_query {
                None => "not used",
                Some(Ok(())) => "works",
                Some(Err(_)) => "fails",
            };
            writeln!(f, ", TLS {tls}, pg_monitor {monitor}, auth query {query}")?;
        }
        writeln!(f, "\neffective routing:")?;
        self.routing.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        if self.problems.is_empty() {
            return writeln!(f, "\nno problems found");
        }
        writeln!(f, "\nproblems:")?;
        self.problems.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(in_recovery: bool) -> NodeFacts {
        NodeFacts {
            in_recovery,
            system_identifier: "7".to_owned(),
            timeline: 1,
            server_version: "15.14".to_owned(),
            server_major: 15,
            lsn: Some(Lsn(if in_recovery { 100 } else { 150 })),
            may_monitor: true,
            may_read_history: true,
            password_encryption: "scram-sha-256".to_owned(),
            offers_tls: false,
            tls_version: None,
            md5_roles: Some(0),
            auth_query: Some(Ok(())),
            settings: [("TimeZone", "UTC"), ("bytea_output", "hex")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            failover: Vec::new(),
        }
    }

    fn config() -> Config {
        let text = "control: { user: u }\nnodes: [ { name: a, host: a }, { name: b, host: b } ]";
        Config::parse(text, "f", &|_| None).unwrap()
    }

    fn report(a: Result<NodeFacts, String>, b: Result<NodeFacts, String>) -> Report {
        let nodes = vec![("a".to_owned(), a), ("b".to_owned(), b)];
        let config = config();
        Report { problems: problems(&config, &nodes), routing: routing(&config, &nodes), nodes }
    }

    #[test]
    fn a_healthy_pair_has_no_problems() {
        let report = report(Ok(facts(false)), Ok(facts(true)));
        assert_eq!(report.problems, Vec::<String>::new());
        let text = report.to_string();
        assert!(
            text.contains("50 bytes behind") && text.contains("go to a.") && text.contains("Reads go to b,")
        );
    }

    #[test]
    fn a_primary_that_nobody_of_its_zone_could_replace_is_spoken_of() {
        let said = |nodes: &str, failover: &str| {
            let text = format!("control: {{ user: u }}\nnodes: [ {nodes} ]\nfailover: {{ {failover} }}");
            let config = Config::parse(&text, "f", &|_| None).unwrap();
            let answers = ["a", "b", "c"].map(|name| (name.to_owned(), Ok(facts(name != "a"))));
            zone_problem(&config, &answers)
        };
        let nodes = |zones: [&str; 3]| {
            let node = |(name, zone)| format!("{{ name: {name}, host: {name}{zone} }}");
            let zone = |zone: &str| if zone.is_empty() { String::new() } else { format!(", zone: {zone}") };
            ["a", "b", "c"].into_iter().zip(zones.map(zone)).map(node).collect::<Vec<_>>().join(", ")
        };
        let manual = "mode: manual";
        let alone = said(&nodes(["x", "y", "y"]), manual).unwrap();
        assert!(alone.starts_with("node a: it is in zone x, and none"), "{alone}");
        assert!(alone.contains("failover.same_zone_only: false"), "{alone}");
        for (zones, failover, expected) in [
            (["x", "x", "y"], manual, false),
            (["", "", ""], manual, false),
            (["", "y", "y"], manual, true),
            (["x", "", ""], manual, true),
            (["x", "y", "y"], "mode: manual, same_zone_only: false", false),
            (["x", "y", "y"], "mode: \"off\"", false),
            (["x", "y", "y"], "mode: follow", false),
            (["x", "x", "y"], "mode: manual, candidates: [ { node: c } ]", true),
            (["x", "x", "y"], "mode: manual, candidates: [ { node: b, priority: 0 }, { node: c } ]", true),
            (["x", "x", "y"], "mode: manual, candidates: [ { node: b } ]", false),
            // Nobody is to take over at all.
            (["x", "y", "y"], "mode: manual, candidates: [ { node: a } ]", false),
        ] {
            assert_eq!(said(&nodes(zones), failover).is_some(), expected, "{zones:?} {failover}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let says = |r: Report, what: &str| assert!(r.problems.iter().any(|p| p.contains(what)), "{r}");
        says(report(Ok(facts(true)), Ok(facts(true))), "no node that answers is a primary");
        says(report(Ok(facts(false)), Ok(facts(false))), "several nodes accept writes: a, b");
        says(report(Ok(facts(false)), Err("refused".to_owned())), "node b (b:5432) cannot be used: refused");
        let odd = NodeFacts {
            system_identifier: "8".to_owned(),
            server_major: 16,
            may_monitor: false,
            failover: vec![Finding { what: "it lacks: GRANT x TO u".to_owned(), refuses: true }],
            may_read_history: false,
            password_encryption: "md5".to_owned(),
            md5_roles: Some(2),
            settings: [("TimeZone".to_owned(), "Asia/Tokyo".to_owned())].into(),
            auth_query: Some(Err("permission denied".to_owned())),
            ..facts(true)
        };
        let report = report(Ok(facts(false)), Ok(odd));
        let text = report.to_string();
        for what in [
            "system identifiers differ: a 7, b 8",
            "major versions differ",
            "lacks pg_monitor",
            "may not execute pg_read_file",
            "a failover would be refused: it lacks: GRANT x TO u",
            "password_encryption is md5",
            "2 roles have md5",
            "node b: other defaults than the primary's: TimeZone Asia/Tokyo (a: UTC): they hold once",
            "auth.query fails for role u: permission denied",
            "Reads go to the primary too",
        ] {
            assert!(text.contains(what), "{what} is missing in\n{text}");
        }
    }
}
