//! Applies a configuration that has been read again, on the control plane's thread.
//!
//! Promises: everything that can fail is tried before anything is changed; then all of it takes effect in one step
//! of the control loop. A reload that changes nothing closes nothing. Deliberately does not decide which keys can
//! be changed (`config::live` does) or whether a node may go (`control::members`).

use std::path::Path;
use std::sync::{Arc, PoisonError};

use tracing::{error, info, warn};

use crate::admin::access::Access;
use crate::config::live::{self, Applies, Membership, Plan};
use crate::config::{Config, ConfigError, Problem};
use crate::control::members::Members;
use crate::listener::Door;
use crate::log;
use crate::net::{ClientTls, NodeTls};
use crate::reload::{Answer, Asked, Report, refused};
use crate::topology::NodeId;

/// Who is told of another configuration.
pub(super) struct Applier {
    pub door: Arc<Door>,
    pub members: Members,
    pub access: Arc<Access>,
    /// `None`: the process does not log by us.
    pub level: Option<log::Level>,
}

impl Applier {
    /// Reloads whenever somebody asks, for ever.
    pub async fn run(self, mut asked: Asked) {
        while let Some(tell) = asked.recv().await {
            let answer = self.reload().await;
            let reloads = &self.door.shared.metrics.reloads;
            match &answer {
                Ok(report) => {
                    reloads.inc("applied");
                    tell_of(report);
                }
                Err(refused) => {
                    reloads.inc("refused");
                    for line in refused.to_string().lines() {
                        error!("configuration not reloaded, what was in force stays: {line}");
                    }
                }
            }
            // Who asked may have gone; it is done.
            let _ = tell.send(answer);
        }
    }

    async fn reload(&self) -> Answer {
        let before = self.door.shared.config.load_full();
        let file =
            before.file.clone().ok_or_else(|| refused("the configuration was not read from a file"))?;
        let known = Arc::clone(&before);
        // Files of secrets and certificates may be slow to read.
        let read = tokio::task::spawn_blocking(move || prepare(&known, &file)).await;
        let Prepared { plan, client_tls, node_tls, warnings } =
            read.map_err(|_| refused("reading the configuration was cut off"))??;
        let name =
            |index: usize| plan.config.nodes.get(index).map(|node| node.name.clone()).unwrap_or_default();
        let report = Report {
            changes: plan.changes.clone(),
            nodes: plan.nodes.iter().map(|change| (name(change.index), change.what)).collect(),
            warnings,
        };
        let (door, level, nodes) = (Arc::clone(&self.door), self.level.clone(), plan.nodes.clone());
        let access = Arc::clone(&self.access);
        let of_failover = !nodes.is_empty() || plan.changes("failover");
        let commit = move || {
            access.set(plan.config.http_token.as_ref());
            commit(&door, level.as_ref(), plan, client_tls, node_tls);
        };
        self.members.change(nodes, of_failover, commit).await.map_err(|why| {
            let problem = Problem { line: 0, column: 0, path: "nodes".to_owned(), message: why };
            ConfigError {
                file: before.file.as_ref().map_or_else(String::new, |f| f.display().to_string()),
                problems: vec![problem],
            }
        })?;
        Ok(report)
    }
}

/// All that was read, and can be used.
struct Prepared {
    plan: Plan,
    client_tls: ClientTls,
    node_tls: NodeTls,
    warnings: Vec<String>,
}

/// Reads the file and what it names, and tries all that can fail.
fn prepare(before: &Config, file: &Path) -> Result<Prepared, ConfigError> {
    let mut wanted = Config::load(file)?;
    let warnings = std::mem::take(&mut wanted.warnings);
    let problem = |path: &str, message: String| ConfigError {
        file: file.display().to_string(),
        problems: vec![Problem { line: 0, column: 0, path: path.to_owned(), message }],
    };
    let plan = live::plan(before, wanted).map_err(|no_room| problem("nodes", no_room.to_string()))?;
    let client_tls =
        ClientTls::new(&plan.config.client_tls).map_err(|e| problem("client_tls", e.to_string()))?;
    let node_tls = NodeTls::new(&plan.config.node_tls).map_err(|e| problem("node_tls", e.to_string()))?;
    Ok(Prepared { plan, client_tls, node_tls, warnings })
}

/// Puts it in force, in one step of the control plane's thread. Nothing here can fail or wait.
fn commit(door: &Door, level: Option<&log::Level>, plan: Plan, client_tls: ClientTls, node_tls: NodeTls) {
    let shared = &door.shared;
    let pools = &shared.pools.context;
    let changed = |prefix| plan.changes(prefix);
    // Connections of before are not made by these any more.
    let other_ways = changed("node_tls") || changed("failover.tcp_user_timeout");
    let reconnect =
        other_ways || changed("control") || changed("pool.connect_timeout") || !plan.nodes.is_empty();
    let (functions, level_changed) = (changed("routing.functions"), changed("log.level"));
    let config = plan.config;
    shared.config.replace(config.clone());

    for (index, node) in config.nodes.iter().enumerate() {
        shared.metrics.name_node(index, &node.name);
    }
    if reconnect {
        shared.nodes.reconnect(&node_tls);
    }
    // Root certificates are read again each time, and are new when their file is.
    pools.tls.store(Arc::new(node_tls));
    // Behind the configuration and the TLS: who reads a new way reads those as well.
    for change in &plan.nodes {
        if let (Membership::Added | Membership::Removed | Membership::Moved, Ok(number)) =
            (change.what, u16::try_from(change.index))
        {
            pools.ways.change(NodeId(number), change.what == Membership::Removed);
        }
    }
    if other_ways {
        let there = (0u16..).map(NodeId).zip(&config.nodes).filter(|(_, node)| !node.removed);
        there.for_each(|(node, _)| pools.ways.change(node, false));
    }
    shared.pools.follow(&config);
    door.tls.store(Arc::new(client_tls));
    door.verifiers.follow(&config, &shared.nodes, &shared.topology);
    shared.catalogs.bound(config.limits.databases);
    if functions {
        shared.catalogs.invalidate_all();
    }
    let consistency = &config.consistency;
    let mut named = shared.named_marks.lock().unwrap_or_else(PoisonError::into_inner);
    named.bound(consistency.named_sessions, consistency.named_session_idle);
    drop(named);
    if let Some(level) = level.filter(|_| level_changed) {
        level.set(&config.log.level);
    }
    shared.sessions.reloaded();
}

fn tell_of(report: &Report) {
    for warning in &report.warnings {
        warn!("{warning}");
    }
    info!("configuration reloaded: {report}");
    let kept = report.keys(Applies::Restart);
    if !kept.is_empty() {
        warn!(keys = kept.join(", "), "these keys have changed in the file, and take a restart");
    }
}
