//! The configuration that is in force, and how another one takes its place while the proxy runs.
//!
//! Promises: each key has one answer to "when does a change of it take effect" ([`RELOADS`], which a test holds
//! against every key there is); what takes a restart keeps its old value; a node keeps its number for the life
//! of the process, and a number is never another node's. Deliberately does not read files or tell anybody:
//! `server` does.

use std::fmt;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use super::{Config, NodeConfig};

/// When a changed key takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applies {
    /// At a reload; for a session, from its next statement on.
    Live,
    /// At a reload, for sessions that begin after it.
    NewSessions,
    /// When the process is started again; a reload keeps the old value.
    Restart,
}

impl Applies {
    /// In words, for logs and tables.
    pub fn words(self) -> &'static str {
        match self {
            Applies::Live => "live",
            Applies::NewSessions => "new sessions",
            Applies::Restart => "restart",
        }
    }
}

/// A key, when it takes effect, and where it is in [`Config`]: from this one table come [`RELOADS`], what has
/// changed, and what is kept.
macro_rules! table {
    ($($key:literal $applies:ident $($field:ident).+;)*) => {
        /// Each key of the file and when a change of it takes effect. A list stands for its entries, a secret for
        /// the three ways to give it.
        pub const RELOADS: &[(&str, Applies)] = &[$(($key, Applies::$applies)),*];

        /// The keys in which two configurations differ.
        fn differing(before: &Config, after: &Config) -> Vec<Change> {
            let mut found = Vec::new();
            $(if before.$($field).+ != after.$($field).+ {
                found.push(Change { key: $key, applies: Applies::$applies });
            })*
            found
        }

        /// What cannot be changed stays.
        fn keep(before: &Config, after: &mut Config) {
            $(if Applies::$applies == Applies::Restart {
                after.$($field).+ = before.$($field).+.clone();
            })*
        }
    };
}

table! {
    "listen" Restart listen;
    "listen_read_only" Restart listen_read_only;
    "http" Restart http;
    "http_token" Live http_token;
    "http_history" Restart http_history;
    "workers" Restart workers;
    "max_clients" Live max_clients;
    "reserved_clients" Live reserved_clients;
    "nodes" Live nodes;
    "control.user" Live control.user;
    "control.password" Live control.password;
    "control.database" Live control.database;
    "auth.source" Live auth.source;
    "auth.users" Live auth.users;
    "auth.admins" Live auth.admins;
    "auth.query" Live auth.query;
    "auth.login_timeout" Live auth.login_timeout;
    "client_tls.mode" Live client_tls.mode;
    "client_tls.cert" Live client_tls.cert;
    "client_tls.key" Live client_tls.key;
    "client_tls.ca" Live client_tls.ca;
    "client_tcp.keepalives_idle" NewSessions client_tcp.keepalives_idle;
    "client_tcp.keepalives_interval" NewSessions client_tcp.keepalives_interval;
    "client_tcp.keepalives_count" NewSessions client_tcp.keepalives_count;
    "client_tcp.user_timeout" NewSessions client_tcp.user_timeout;
    "node_tls.mode" Live node_tls.mode;
    "node_tls.ca" Live node_tls.ca;
    "pool.mode" NewSessions pool.mode;
    "pool.size" Live pool.size;
    "pool.max_backends_per_node" Live pool.max_backends_per_node;
    "pool.users" Live pool.users;
    "pool.databases" Live pool.databases;
    "pool.query_wait_timeout" Live pool.query_wait_timeout;
    "pool.connect_timeout" Live pool.connect_timeout;
    "pool.server_idle_timeout" Live pool.server_idle_timeout;
    "pool.server_lifetime" Live pool.server_lifetime;
    "pool.max_prepared" Live pool.max_prepared;
    "pool.share_unnamed" Live pool.share_unnamed;
    "consistency.level" Live consistency.promise.level;
    "consistency.on_stale" Live consistency.promise.on_stale;
    "consistency.rules" Live consistency.rules;
    "consistency.quorum_reads" Live consistency.quorum_reads;
    "consistency.max_lag" Live consistency.max_lag;
    "consistency.catch_up_wait" Live consistency.catch_up_wait;
    "consistency.primary_read_cap" Live consistency.primary_read_cap;
    "consistency.primary_read_wait" Live consistency.primary_read_wait;
    "consistency.clock_tolerance" Live consistency.clock_tolerance;
    "consistency.named_sessions" Live consistency.named_sessions;
    "consistency.named_session_idle" Live consistency.named_session_idle;
    "consistency.sample_interval" Live consistency.sample_interval;
    "consistency.sample_gap" Live consistency.sample_gap;
    "durability.default" NewSessions durability.default;
    "durability.rules" NewSessions durability.rules;
    "routing.split" Live routing.split;
    "routing.shadow" Live routing.shadow;
    "routing.rules" Live routing.rules;
    "routing.transactions" NewSessions routing.transactions;
    "routing.read_only_transactions" NewSessions routing.read_only_on_replicas;
    "routing.functions" Live routing.functions;
    "routing.zone" Live routing.zone;
    "limits.unit_hold" Live limits.unit_hold;
    "limits.statement_text" Live limits.statement_text;
    "limits.statements_per_session" Live limits.statements_per_session;
    "limits.session_settings" Live limits.session_settings;
    "limits.class_cache" Restart limits.class_cache;
    "limits.databases" Live limits.databases;
    "limits.parser_text" Restart limits.parser_text;
    "limits.parser_deadline" Restart limits.parser_deadline;
    "limits.nodes" Restart limits.nodes;
    "limits.admin_connections" Live limits.admin_connections;
    "limits.statement_stats" Restart limits.statement_stats;
    "timeouts.idle_session" Live timeouts.idle_session;
    "timeouts.idle_in_transaction" Live timeouts.idle_in_transaction;
    "timeouts.transaction" Live timeouts.transaction;
    "replication.max_connections" Live replication.max_connections;
    "failover.mode" Restart failover.mode;
    "failover.durability" Restart failover.durability;
    "failover.state_dir" Restart failover.state_dir;
    "failover.sync" Restart failover.sync;
    "failover.coordination" Restart failover.coordination;
    "failover.slots" Restart failover.slots;
    "failover.candidates" Live failover.candidates;
    "failover.same_zone_only" Live failover.same_zone_only;
    "failover.fence.sql" Live failover.fence_sql;
    "failover.max_paused" Live failover.max_paused;
    "failover.kick_timeout" Live failover.kick_timeout;
    "failover.restart_grace" Live failover.restart_grace;
    "failover.crash_loop_restarts" Live failover.crash_loop_restarts;
    "failover.crash_loop_window" Live failover.crash_loop_window;
    "failover.startup_grace" Live failover.startup_grace;
    "failover.sever_timeout" Restart failover.sever_timeout;
    "failover.promote_timeout" Live failover.promote_timeout;
    "failover.max_lost_bytes" Live failover.max_lost_bytes;
    "failover.min_failover_interval" Live failover.min_failover_interval;
    "failover.allow_minority" Live failover.allow_minority;
    "failover.lost_write" Live failover.lost_write;
    "failover.check_interval" Live failover.check_interval;
    "failover.check_timeout" Live failover.check_timeout;
    "failover.failure_threshold" Live failover.failure_threshold;
    "failover.eject_time" Live failover.eject_time;
    "failover.tcp_user_timeout" Live failover.tcp_user_timeout;
    "failover.pause_timeout" Live failover.pause_timeout;
    "log.format" Restart log.format;
    "log.level" Live log.level;
    "log.slow_statement" Live log.slow_statement;
    "log.slow_per_second" Live log.slow_per_second;
    "log.connections" Live log.connections;
    "drain_timeout" Live drain_timeout;
}

/// Keys within entries of lists that differ from the list they are in, and keys that have no value yet.
const EXCEPTIONS: &[(&str, Applies)] =
    &[("pool.users[].mode", Applies::NewSessions), ("pool.databases[].mode", Applies::NewSessions)];

/// When a change of `key` takes effect: a key as docs/CONFIGURATION.md names it (`pool.size`, `nodes[].weight`).
/// `None`: there is no such key, or it is a section.
pub fn applies(key: &str) -> Option<Applies> {
    let find = |key: &str| {
        EXCEPTIONS.iter().chain(RELOADS).find(|(name, _)| *name == key).map(|(_, applies)| *applies)
    };
    let plain = key
        .strip_suffix("_env")
        .or(key.strip_suffix("_file"))
        .filter(|k| ["password", "token"].iter().any(|secret| k.ends_with(secret)));
    find(plain.unwrap_or(key))
        .or_else(|| find(key.split_once("[]")?.0))
        .or_else(|| find(key.rsplit_once('.')?.0))
}

/// A key whose value differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key; of a list's entries, the list's.
    pub key: &'static str,
    /// When it takes effect.
    pub applies: Applies,
}

/// What becomes of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It was not there, or had been removed.
    Added,
    /// It is used no more.
    Removed,
    /// It has another host or port.
    Moved,
    /// Its weight or another property differs.
    Changed,
}

impl Membership {
    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Membership::Added => "added",
            Membership::Removed => "removed",
            Membership::Moved => "moved",
            Membership::Changed => "changed",
        }
    }
}

/// What becomes of the node with this index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeChange {
    /// Its index among [`Config::nodes`], for good.
    pub index: usize,
    /// What.
    pub what: Membership,
}

/// What a reload does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What will be in force: the file's values, but for those that take a restart; the nodes at their places.
    pub config: Config,
    /// The keys that differ.
    pub changes: Vec<Change>,
    /// The nodes that differ.
    pub nodes: Vec<NodeChange>,
}

impl Plan {
    /// Whether a key or (by its prefix) a section changes, other than at a restart.
    pub fn changes(&self, prefix: &str) -> bool {
        let is =
            |key: &str| key.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        self.changes.iter().any(|change| is(change.key) && change.applies != Applies::Restart)
    }
}

/// Why what a file says cannot take the place of what is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoRoom {
    /// The first node without a place.
    pub node: String,
    /// How many there are.
    pub places: usize,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no place is left for node `{}`: the process has had its {} names of nodes (limits.nodes); \
             it must be started again",
            self.node, self.places
        )
    }
}

impl std::error::Error for NoRoom {}

/// What takes the place of `before` when the file now says `wanted`.
pub fn plan(before: &Config, wanted: Config) -> Result<Plan, NoRoom> {
    let mut config = wanted;
    let (seats, nodes) = seat(&before.nodes, &config.nodes, before.places())?;
    if let Some(quorum) = &mut config.consistency.quorum_reads {
        // By the order of the file, until here.
        let seat = |at: &u16| {
            let name = &config.nodes.get(usize::from(*at))?.name;
            u16::try_from(seats.iter().position(|seat| seat.name == *name)?).ok()
        };
        quorum.replicas = quorum.replicas.iter().filter_map(seat).collect();
    }
    config.nodes = seats;
    let changes = differing(before, &config);
    keep(before, &mut config);
    config.given.keep(&before.given);
    Ok(Plan { config, changes, nodes })
}

/// Gives each node its place: who has one (by name) keeps it; who is not wanted any more is marked.
fn seat(
    before: &[NodeConfig],
    wanted: &[NodeConfig],
    places: usize,
) -> Result<(Vec<NodeConfig>, Vec<NodeChange>), NoRoom> {
    let mut seats = before.to_vec();
    let mut changes = Vec::new();
    for (index, seat) in seats.iter_mut().enumerate() {
        match wanted.iter().find(|node| node.name == seat.name) {
            None if seat.removed => {}
            None => {
                seat.removed = true;
                changes.push(NodeChange { index, what: Membership::Removed });
            }
            Some(node) if node == seat => {}
            Some(node) => {
                let what = if seat.removed {
                    Membership::Added
                } else if (&node.host, node.port) != (&seat.host, seat.port) {
                    Membership::Moved
                } else {
                    Membership::Changed
                };
                *seat = node.clone();
                changes.push(NodeChange { index, what });
            }
        }
    }
    for node in wanted.iter().filter(|node| before.iter().all(|seat| seat.name != node.name)) {
        if seats.len() >= places {
            return Err(NoRoom { node: node.name.clone(), places });
        }
        changes.push(NodeChange { index: seats.len(), what: Membership::Added });
        seats.push(node.clone());
    }
    Ok((seats, changes))
}

impl Config {
    /// Nodes at most over the life of a process that was started with this configuration.
    pub fn places(&self) -> usize {
        self.limits.nodes.max(self.nodes.len())
    }

    /// How many slots each node keeps, if `failover.slots` are kept.
    pub fn slots_kept(&self) -> Option<usize> {
        let nodes = self.nodes.iter().filter(|node| !node.removed).count();
        self.failover.slots.manage.then(|| nodes.saturating_sub(1))
    }

    /// Whether the node with this index is in the zone that this proxy is told to be in (`routing.zone`).
    pub fn is_near(&self, index: usize) -> bool {
        let own = self.routing.zone.as_ref();
        own.is_some_and(|own| self.nodes.get(index).is_some_and(|node| node.zone.as_ref() == Some(own)))
    }
}

/// The configuration that is in force, for all who go by it.
pub struct LiveConfig {
    current: ArcSwap<Config>,
}

impl LiveConfig {
    /// `config` is in force from now on.
    pub fn new(config: Config) -> Arc<LiveConfig> {
        Arc::new(LiveConfig { current: ArcSwap::from_pointee(config) })
    }

    /// What is in force, for a moment; without a lock.
    pub fn load(&self) -> Guard<Arc<Config>> {
        self.current.load()
    }

    /// What is in force, to be kept.
    pub fn load_full(&self) -> Arc<Config> {
        self.current.load_full()
    }

    /// Whether `known` is still in force; else what is.
    pub fn changed_from(&self, known: &Arc<Config>) -> Option<Arc<Config>> {
        let current = self.current.load();
        (!Arc::ptr_eq(&current, known)).then(|| Guard::into_inner(current))
    }

    /// Puts another in its place. Only `server` does.
    pub fn replace(&self, config: Config) {
        self.current.store(Arc::new(config));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::SECTIONS;
    use super::*;

    fn config(nodes: &str, rest: &str) -> Config {
        let text = format!("control: {{ user: u, password: p }}\nnodes: [ {nodes} ]\n{rest}");
        Config::parse(&text, "f.yaml", &|_| None).unwrap()
    }

    const A: &str = "{ name: a, host: h }";
    const B: &str = "{ name: b, host: h, port: 2 }";

    #[test]
    fn every_key_says_when_it_takes_effect() {
        let is_section = |name: &str| SECTIONS.iter().any(|(section, _)| *section == name);
        let mut keys = Vec::new();
        for (section, names) in SECTIONS {
            let dot = if section.is_empty() { "" } else { "." };
            keys.extend(names.iter().map(|name| format!("{section}{dot}{name}")));
        }
        keys.retain(|key| !is_section(key));
        for key in &keys {
            assert!(applies(key).is_some(), "{key} is not in the table of src/config/live.rs");
        }
        let plain = |key: &str| keys.iter().any(|k| k == key);
        for (key, _) in RELOADS.iter().chain(EXCEPTIONS) {
            assert!(plain(key) || is_section(key), "{key} is in the table, and not in the file");
        }
        assert_eq!(applies("auth.users[].password_env"), Some(Applies::Live));
        assert_eq!(applies("pool.users[].mode"), Some(Applies::NewSessions));
        assert_eq!(applies("workers"), Some(Applies::Restart));
        assert_eq!((applies("pool"), applies("nonsense.x")), (None, None));
    }

    #[test]
    fn the_reference_page_says_the_same() {
        let page = include_str!("../../docs/CONFIGURATION.md");
        let page = page.split("## Reloading").nth(1).unwrap();
        let listed = |from: &str| {
            let paragraph = page.split(from).nth(1).unwrap().split("\n\n").next().unwrap();
            let mut keys: Vec<&str> = paragraph.split('`').skip(1).step_by(2).collect();
            keys.sort_unstable();
            keys
        };
        let of = |applies| {
            let all = RELOADS.iter().chain(EXCEPTIONS);
            let mut keys: Vec<&str> = all.filter(|(_, when)| *when == applies).map(|(key, _)| *key).collect();
            keys.sort_unstable();
            keys
        };
        assert_eq!(listed("keeps the old values:"), of(Applies::Restart));
        assert_eq!(listed("keep what they began with:"), of(Applies::NewSessions));
    }

    #[test]
    fn what_takes_a_restart_keeps_its_value_and_is_named() {
        let before = config(A, "workers: 1\nlisten: 127.0.0.1:1\npool: { size: 3 }");
        let after = config(A, "workers: 2\nlisten: 127.0.0.1:2\npool: { size: 4, mode: session }");
        let plan = plan(&before, after).unwrap();
        let of =
            |applies| plan.changes.iter().filter(|c| c.applies == applies).map(|c| c.key).collect::<Vec<_>>();
        assert_eq!(of(Applies::Restart), ["listen", "workers"]);
        assert_eq!((of(Applies::Live), of(Applies::NewSessions)), (vec!["pool.size"], vec!["pool.mode"]));
        assert_eq!((plan.config.workers, plan.config.listen.as_str()), (1, "127.0.0.1:1"));
        assert_eq!(plan.config.pool.size, 4);
        assert!(plan.changes("pool.size") && plan.changes("pool") && !plan.changes("workers"));
        assert!(!plan.changes("poo") && !plan.changes("routing"));
    }

    #[test]
    fn the_same_file_changes_nothing() {
        let rest = "log: { level: debug }\ntimeouts: { idle_session: 5s }";
        let before = config(&format!("{A}, {B}"), rest);
        let plan = plan(&before, config(&format!("{A}, {B}"), rest)).unwrap();
        assert_eq!((plan.changes.len(), plan.nodes.len()), (0, 0));
        assert_eq!(plan.config.timeouts.idle_session, Duration::from_secs(5));
    }

    #[test]
    fn a_secret_that_changes_is_noticed() {
        let mut after = config(A, "");
        after.control.password = Some(super::super::Secret("q".to_owned()));
        let plan = plan(&config(A, ""), after).unwrap();
        assert_eq!(plan.changes, [Change { key: "control.password", applies: Applies::Live }]);
    }

    #[test]
    fn nodes_that_are_named_elsewhere_are_found_at_their_places() {
        let rest = "consistency: { quorum_reads: { replicas: [ b ] } }";
        let before = config(&format!("{A}, {B}"), "");
        let plan = plan(&before, config(&format!("{B}, {A}"), rest)).unwrap();
        assert_eq!(plan.config.consistency.quorum_reads.unwrap().replicas, [1]);
    }

    #[test]
    fn a_node_keeps_its_place_and_a_place_its_node() {
        let step = |before: &Config, nodes: &str| plan(before, config(nodes, "limits: { nodes: 3 }"));
        let names = |c: &Config| {
            c.nodes
                .iter()
                .map(|n| format!("{}{}", n.name, if n.removed { "-" } else { "" }))
                .collect::<Vec<_>>()
        };
        let change = |index, what| NodeChange { index, what };
        let before = config(&format!("{A}, {B}"), "limits: { nodes: 3 }");
        // The order in the file is of no consequence.
        let same = step(&before, &format!("{B}, {A}")).unwrap();
        assert_eq!((names(&same.config), same.nodes), (vec!["a".to_owned(), "b".to_owned()], vec![]));
        let gone = step(&before, A).unwrap();
        assert_eq!(
            (names(&gone.config), &gone.nodes[..]),
            (vec!["a".into(), "b-".into()], &[change(1, Membership::Removed)][..])
        );
        // A removed one stays removed, and its place is not another's.
        let other = step(&gone.config, &format!("{A}, {{ name: c, host: i }}")).unwrap();
        assert_eq!(names(&other.config), ["a", "b-", "c"]);
        assert_eq!(other.nodes, [change(2, Membership::Added)]);
        let back = step(&other.config, &format!("{A}, {{ name: b, host: elsewhere }}")).unwrap();
        assert_eq!(names(&back.config), ["a", "b", "c-"]);
        assert_eq!(back.nodes, [change(1, Membership::Added), change(2, Membership::Removed)]);
        let moved = step(&before, "{ name: a, host: h, weight: 2 }, { name: b, host: h, port: 3 }").unwrap();
        assert_eq!(moved.nodes, [change(0, Membership::Changed), change(1, Membership::Moved)]);
        let full = step(&other.config, &format!("{A}, {{ name: d, host: i }}")).unwrap_err();
        assert_eq!((full.node.as_str(), full.places), ("d", 3));
    }
}
