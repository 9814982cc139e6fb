//! `EXPLAIN ROUTE`: where a statement would go now, and why; in the words of `highwater route`, with what the running
//! proxy knows: the catalog facts, the rules, and each replica's position against the mark of a session that begins now.

use std::time::{Duration, Instant};

use super::Asker;
use super::command::Argument;
use super::protocol::Reply;
use super::reply::{Column, Kind, Value};
use crate::classify::{Lexing, Lookup, Statement};
use crate::explain::{Explanation, Rules};
use crate::positions::SampleBody;
use crate::session::mark::{Mark, PrimaryVerdict, ReplicaVerdict};
use crate::topology::{NodeView, Standing, Topology};
use crate::wire::ErrorReport;

/// How long a database's facts, or a sample of the primary, may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked whether the facts are there.
const LOOK: Duration = Duration::from_millis(20);

impl Asker<'_> {
    /// Explains `sql` for a session of `user` in `database`.
    pub(super) async fn explain(
        &self,
        database: Option<&Argument>,
        user: Option<&Argument>,
        sql: &str,
    ) -> Result<Reply, ErrorReport> {
        let shared = &self.console.shared;
        let config = shared.config.load_full();
        let database = database.map_or(config.control.database.as_str(), Argument::text).to_owned();
        let user = user.map_or(&*self.handle.facts.identity.user, Argument::text).to_owned();
        // Its loader starts at the first question, and ends when nobody uses the database any more.
        let catalog = shared.catalogs.database(&database);
        let until = Instant::now() + PATIENCE;
        let mut waited = Ok(());
        while waited.is_ok() && !catalog.current().is_loaded() && Instant::now() < until {
            waited = self.wait(tokio::time::sleep(LOOK)).await;
        }
        let facts = catalog.current();
        drop(catalog);
        shared.catalogs.release_if_unused(&database);
        waited?;
        let statement =
            Statement { text: sql.as_bytes(), parameter_types: &[], catalog: &facts, lexing: Lexing::Utf8 };
        let class = match shared.classifier.lookup(&statement) {
            Lookup::Known(class, _) => class,
            Lookup::Ask(question) => shared.classifier.ask(question).await,
        };
        let rules = Rules::of(&config, &user, &database, class.hints);
        let reads = class.is_read() && !rules.keeps_reads_on_primary();
        let mark = self.fresh_mark().await?;
        let topology = shared.topology.load_full();
        let nodes = topology.nodes.iter();
        let nodes =
            nodes.map(|node| (node.name.to_string(), self.says(&topology, node, &mark, reads))).collect();
        let mut explanation =
            Explanation::new(class, shared.classifier.suspects(&statement)).in_database(&database, rules);
        explanation.nodes = nodes;
        explanation.mark = mark.is_resolved().then(|| mark.position());
        let rows: Vec<Vec<Value>> =
            explanation.facts().into_iter().map(|(item, value)| vec![item.into(), value.into()]).collect();
        let columns = ["item", "value"].map(|name| Column { name: name.into(), kind: Kind::Text });
        Ok(Reply::Rows { columns: columns.to_vec(), rows: Box::new(rows.into_iter()), tag: "EXPLAIN" })
    }

    async fn wait(&self, what: impl Future<Output = ()>) -> Result<(), ErrorReport> {
        tokio::select! {
            biased;
            () = self.handle.interrupted() => {
                Err(ErrorReport::error("57014", "canceling statement due to user request"))
            }
            () = what => Ok(()),
        }
    }

    /// The mark of a session that begins now, as far as a sample of the primary comes in time; and a sample of each
    /// replica beside it, if one comes in time for a read.
    async fn fresh_mark(&self) -> Result<Mark, ErrorReport> {
        let shared = &self.console.shared;
        let positions = &*shared.positions;
        let mut mark = Mark::new(positions, &shared.topology.load());
        let until = tokio::time::Instant::now() + PATIENCE;
        let wait = shared.config.load().consistency.catch_up_wait;
        let mut resolved_at = None;
        loop {
            let changed = positions.changed();
            let topology = shared.topology.load_full();
            mark.follow(positions, &topology);
            mark.absorb(positions, &topology);
            let now = tokio::time::Instant::now();
            if mark.is_resolved() {
                resolved_at.get_or_insert(now);
            }
            let all = topology.serving_replicas().all(|view| {
                matches!(mark.replica(positions, &topology, view.id), ReplicaVerdict::Serves { .. })
            });
            let end = resolved_at.map_or(until, |at| at + wait).min(until);
            if mark.is_resolved() && all || now >= end || topology.primary.is_none() {
                return Ok(mark);
            }
            for node in mark.awaits().into_iter().chain(topology.serving_replicas().map(|view| view.id)) {
                positions.node(node).want();
            }
            self.wait(async { _ = tokio::time::timeout_at(end, changed).await }).await?;
        }
    }

    /// What `routing.zone` says of a replica that may serve.
    fn nearness(&self, node: &NodeView) -> String {
        let config = self.console.shared.config.load();
        let Some(own) = &config.routing.zone else { return String::new() };
        match config.nodes.get(node.id.index()).and_then(|node| node.zone.as_deref()) {
            Some(zone) if zone == own => format!("; it is in this proxy's zone {own}"),
            Some(zone) => format!("; in zone {zone}: only while no replica of zone {own} may"),
            None => format!("; in no zone: only while no replica of zone {own} may"),
        }
    }

    /// Whether this node may serve the statement, for a session that begins now.
    fn says(&self, topology: &Topology, node: &NodeView, mark: &Mark, reads: bool) -> String {
        let shared = &self.console.shared;
        let positions = &*shared.positions;
        match &node.standing {
            Standing::Primary { reachable: false } => "no: the primary, which cannot be reached".to_owned(),
            Standing::Primary { reachable: true } => match mark.primary(positions, topology) {
                PrimaryVerdict::Serves if reads => "yes, where no replica may".to_owned(),
                PrimaryVerdict::Serves => "yes".to_owned(),
                PrimaryVerdict::Unresolved(_) | PrimaryVerdict::BelowFloor => "yes, in a moment".to_owned(),
            },
            Standing::Excluded(why) => format!("no: {why}"),
            Standing::Replica if !reads => "no: a replica".to_owned(),
            Standing::Replica if shared.topology.is_drained(node.id) => "no: it is drained".to_owned(),
            Standing::Replica if node.weight == 0 => "no: its weight is 0".to_owned(),
            Standing::Replica => {
                let replayed = match positions.node(node.id).latest().map(|sample| sample.body) {
                    Some(SampleBody::Replica { replay, .. }) => format!("it has replayed {replay}"),
                    _ => "its position is not known".to_owned(),
                };
                match mark.replica(positions, topology, node.id) {
                    ReplicaVerdict::Serves { .. } => format!("yes: {replayed}{}", self.nearness(node)),
                    ReplicaVerdict::Behind => format!("not yet: {replayed}, which is behind the mark"),
                    ReplicaVerdict::Unresolved | ReplicaVerdict::Unknown => format!("not yet: {replayed}"),
                }
            }
        }
    }
}
