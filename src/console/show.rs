//! The tables: what the parts publish, as rows.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::command::{Asked, Command, HELP, Of, PARAMETERS, Pick, Scalar, Table, Wanted};
use super::protocol::Reply;
use super::reply::{Column, Kind, Rows, Value};
use super::{Asker, DATABASE};
use crate::control::Status;
use crate::metrics::{WaitFor, role_label};
use crate::positions::SampleBody;
use crate::route::{ClassLabel, RouteReason};
use crate::session::facts::{Facts, Sums, Wait};
use crate::session::handle::SessionHandle;
use crate::topology::{NodeId, NodeView, Standing, Topology};
use crate::wire::ErrorReport;

use Kind::{Bool, Float, Int, Text, Time};

type Columns = &'static [(&'static str, Kind)];

const NODES: Columns = &[
    ("name", Text),
    ("host", Text),
    ("port", Int),
    ("role", Text),
    ("standing", Text),
    ("why", Text),
    ("drained", Bool),
    ("weight", Int),
    ("version", Int),
    ("timeline", Int),
    ("lsn", Text),
    ("lag_bytes", Int),
    ("lag_seconds", Float),
    ("running", Int),
    ("backends", Int),
    ("zone", Text),
];

const LAG: Columns = &[
    ("node", Text),
    ("role", Text),
    ("insert_lsn", Text),
    ("visible_floor", Text),
    ("receive_lsn", Text),
    ("replay_lsn", Text),
    ("lag_bytes", Int),
    ("lag_seconds", Float),
    ("replay_bytes_per_second", Int),
    ("catch_up_seconds", Float),
    ("sample", Int),
    ("sample_age_seconds", Float),
    ("replay_paused", Bool),
    ("apply_delay_seconds", Float),
    ("conflicts", Int),
];

const POOLS: Columns = &[
    ("node", Text),
    ("database", Text),
    ("user", Text),
    ("idle", Int),
    ("active", Int),
    ("connecting", Int),
    ("waiting", Int),
    ("size", Int),
    ("paused", Bool),
];

const SESSIONS: Columns = &[
    ("pid", Int),
    ("kind", Text),
    ("user", Text),
    ("database", Text),
    ("application_name", Text),
    ("client", Text),
    ("connected", Time),
    ("state", Text),
    ("since", Time),
    ("seconds", Float),
    ("wait", Text),
    ("pins", Text),
    ("node", Text),
    ("mark", Text),
    ("mark_awaits", Text),
    ("statements", Int),
    ("received_bytes", Int),
    ("sent_bytes", Int),
];

const STATS: Columns = &[
    ("database", Text),
    ("user", Text),
    ("sessions", Int),
    ("statements", Int),
    ("reads_on_replicas", Int),
    ("reads_on_primary", Int),
    ("why_on_primary", Text),
    ("other_statements", Int),
    ("received_bytes", Int),
    ("sent_bytes", Int),
    ("waits", Int),
    ("waited_seconds", Float),
    ("waited_for", Text),
];

const STATEMENTS: Columns = &[
    ("database", Text),
    ("class", Text),
    ("reason", Text),
    ("on_replicas", Int),
    ("on_primary", Int),
    ("mean_seconds", Float),
    ("max_seconds", Float),
    ("total_seconds", Float),
    ("statement", Text),
];

const CONFIG: Columns =
    &[("key", Text), ("value", Text), ("default", Text), ("source", Text), ("applies", Text)];

const HISTORY: Columns = &[
    ("epoch", Int),
    ("ended", Time),
    ("old_primary", Text),
    ("new_primary", Text),
    ("planned", Bool),
    ("old_timeline", Int),
    ("fork_lsn", Text),
    ("last_sampled_lsn", Text),
    ("lost_bytes_min", Int),
    ("took_seconds", Float),
];

const ITEMS: Columns = &[("item", Text), ("value", Text)];

fn columns_of(table: Table) -> Columns {
    match table {
        Table::Nodes => NODES,
        Table::Lag => LAG,
        Table::Pools => POOLS,
        Table::Sessions => SESSIONS,
        Table::Stats => STATS,
        Table::Statements => STATEMENTS,
        Table::Config => CONFIG,
        Table::History => HISTORY,
        Table::Failover | Table::Topology => ITEMS,
        Table::Version => &[("version", Text), ("started", Time), ("process_id", Int)],
        Table::Help => &[("command", Text), ("meaning", Text)],
    }
}

fn column(name: impl Into<Cow<'static, str>>, kind: Kind) -> Column {
    Column { name: name.into(), kind }
}

/// Where a column of an answer comes from.
#[derive(Clone, Copy)]
enum Place {
    /// The table's column at this place.
    At(usize),
    /// The clock.
    Now,
}

/// The columns that are picked, and where they come from.
fn picked(table: Table, pick: &Pick) -> Result<Vec<(Column, Place)>, ErrorReport> {
    let all = columns_of(table);
    if pick.columns.is_empty() {
        let own = all.iter().enumerate();
        return Ok(own.map(|(at, (name, kind))| (column(*name, *kind), Place::At(at))).collect());
    }
    let one = |wanted: &Wanted| {
        let name = match &wanted.what {
            Of::Now => return Ok((column(wanted.name.clone(), Time), Place::Now)),
            Of::Column(name) => name,
        };
        let at = all.iter().position(|(known, _)| known == name).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
            ErrorReport::error("42703", format!("column \"{name}\" does not exist")).hint(format!(
                "{} has {}.",
                table.name(),
                names.join(", ")
            ))
        })?;
        Ok((column(wanted.name.clone(), all[at].1), Place::At(at)))
    };
    pick.columns.iter().map(one).collect()
}

/// The columns that a command answers; none, if it answers no rows.
pub(super) fn columns(command: &Command) -> Result<Vec<Column>, ErrorReport> {
    Ok(match command {
        Command::Table(table, pick) => picked(*table, pick)?.into_iter().map(|(column, _)| column).collect(),
        Command::Parameter(name) => vec![column(name.clone(), Text)],
        Command::Scalars(scalars) => scalars.iter().map(scalar_column).collect(),
        Command::ExplainRoute { .. } => ITEMS.iter().map(|(name, kind)| column(*name, *kind)).collect(),
        _ => Vec::new(),
    })
}

fn scalar_column(scalar: &Scalar) -> Column {
    let kind = match scalar.what {
        Asked::Number(_) | Asked::Pid | Asked::Setting(_, Some(_)) => Int,
        Asked::InRecovery => Bool,
        Asked::Now => Time,
        Asked::Text(_) | Asked::Version | Asked::Database | Asked::User | Asked::Setting(_, None) => Text,
    };
    column(scalar.name.clone(), kind)
}

/// What a sum of reasons says: `behind=3 no_replica=1`, the most first.
fn said(counts: &[u64], label: impl Fn(usize) -> &'static str) -> Value {
    let mut some: Vec<(u64, &str)> =
        counts.iter().enumerate().filter(|(_, n)| **n > 0).map(|(at, n)| (*n, label(at))).collect();
    some.sort_by_key(|(n, label)| (std::cmp::Reverse(*n), *label));
    let words: Vec<String> = some.into_iter().map(|(n, label)| format!("{label}={n}")).collect();
    if words.is_empty() { Value::Null } else { words.join(" ").into() }
}

fn shown<T: std::fmt::Display>(value: T) -> Value {
    value.to_string().into()
}

impl Asker<'_> {
    /// Answers a command that shows something.
    pub(super) fn show(&self, table: Table, pick: &Pick) -> Result<Reply, ErrorReport> {
        let (columns, places): (_, Vec<Place>) = picked(table, pick)?.into_iter().unzip();
        let (rows, whole, now) = (self.rows(table), pick.columns.is_empty(), SystemTime::now());
        let value = move |row: &[Value], place: &Place| match place {
            Place::At(at) => row[*at].clone(),
            Place::Now => Value::Time(now),
        };
        let rows = rows.map(move |row| match whole {
            true => row,
            false => places.iter().map(|place| value(&row, place)).collect(),
        });
        let most = pick.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(Reply::Rows { columns, rows: Box::new(rows.take(most)), tag: "SHOW" })
    }

    fn rows(&self, table: Table) -> Rows {
        match table {
            Table::Nodes => self.nodes(),
            Table::Lag => self.lag(),
            Table::Pools => self.pools(),
            Table::Sessions => self.sessions(),
            Table::Stats => self.stats(),
            Table::Statements => self.statements(),
            Table::Config => self.config(),
            Table::Failover => self.failover(),
            Table::History => self.history(),
            Table::Topology => self.topology(),
            Table::Version => {
                let started = Value::Time(self.console.started);
                Box::new(std::iter::once(vec![self.version().into(), started, std::process::id().into()]))
            }
            Table::Help => {
                Box::new(HELP.iter().map(|(form, meaning)| vec![Value::from(*form), Value::from(*meaning)]))
            }
        }
    }

    fn nodes(&self) -> Rows {
        let shared = self.console.shared.clone();
        let topology = shared.topology.load_full();
        let config = shared.config.load_full();
        let mut backends = vec![0_usize; topology.nodes.len()];
        for pool in shared.pools.counts() {
            if let Some(sum) = backends.get_mut(pool.node.index()) {
                *sum += pool.idle + pool.active;
            }
        }
        let rows = (0..topology.nodes.len()).map(move |at| {
            let node = &topology.nodes[at];
            let address = config.nodes.get(at);
            let (standing, why) = standing(&node.standing);
            let outstanding = shared.pools.context.outstanding.get(at);
            vec![
                (&*node.name).into(),
                address.map(|a| a.host.as_str()).into(),
                address.map(|a| u64::from(a.port)).into(),
                role_label(&node.standing).into(),
                standing.into(),
                why.into(),
                shared.topology.is_drained(node.id).into(),
                node.weight.into(),
                node.server_major.map(u32::from).into(),
                node.timeline.map(|t| t.0).into(),
                position(&shared, node.id),
                node.replay_lag_bytes.into(),
                node.replay_lag.into(),
                outstanding.map(|n| n.load(Ordering::Relaxed)).into(),
                backends[at].into(),
                address.and_then(|a| a.zone.as_deref()).into(),
            ]
        });
        Box::new(rows)
    }

    fn lag(&self) -> Rows {
        let shared = self.console.shared.clone();
        let topology = shared.topology.load_full();
        let rows = (0..topology.nodes.len()).map(move |at| {
            let node = &topology.nodes[at];
            let sample = shared.positions.node(node.id).latest();
            let mut row = vec![Value::from(&*node.name), role_label(&node.standing).into()];
            row.extend(match sample.map(|sample| sample.body) {
                Some(SampleBody::Primary { insert, floor }) => {
                    [shown(insert), shown(floor), Value::Null, Value::Null]
                }
                Some(SampleBody::Replica { receive, replay, .. }) => {
                    [Value::Null, Value::Null, receive.map(|lsn| lsn.to_string()).into(), shown(replay)]
                }
                None => [Value::Null, Value::Null, Value::Null, Value::Null],
            });
            let age = match sample.map(|sample| sample.body) {
                Some(SampleBody::Replica { late, .. }) => Some(late.asked_at.elapsed()),
                _ => None,
            };
            row.extend([
                node.replay_lag_bytes.into(),
                node.replay_lag.into(),
                node.replay_rate.into(),
                node.catch_up.into(),
                sample.map(|sample| sample.number).into(),
                age.into(),
                node.recovery.map(|r| r.paused).into(),
                node.recovery.map(|r| r.apply_delay).into(),
                node.recovery.map(|r| r.conflicts).into(),
            ]);
            row
        });
        Box::new(rows)
    }

    fn pools(&self) -> Rows {
        let shared = self.console.shared.clone();
        let topology = shared.topology.load_full();
        let mut pools = shared.pools.counts();
        pools.sort_by(|a, b| (&a.database, &a.user, a.node).cmp(&(&b.database, &b.user, b.node)));
        Box::new(pools.into_iter().map(move |pool| {
            vec![
                name(&topology, Some(pool.node)),
                (&*pool.database).into(),
                (&*pool.user).into(),
                pool.idle.into(),
                pool.active.into(),
                pool.opening.into(),
                pool.waiting.into(),
                pool.size.into(),
                shared.pauses.holds(&pool.database).into(),
            ]
        }))
    }

    fn sessions(&self) -> Rows {
        let topology = self.console.shared.topology.load_full();
        let all = self.console.shared.sessions.all();
        Box::new(all.into_iter().map(move |handle| session(&topology, &handle)))
    }

    fn stats(&self) -> Rows {
        let sums = self.console.shared.sessions.sums();
        Box::new(sums.into_iter().map(|((database, user), sums)| stats(&database, &user, &sums)))
    }

    fn statements(&self) -> Rows {
        let entries = self.console.shared.ledger.entries();
        Box::new(entries.into_iter().map(|entry| {
            let runs = entry.on_primary + entry.on_replicas;
            let mean = Duration::from_secs_f64(entry.total.as_secs_f64() / runs.max(1) as f64);
            vec![
                (&*entry.database).into(),
                ClassLabel::LABELS[ClassLabel::of(entry.class.shown()) as usize].into(),
                entry.class.reason.explained().0.into(),
                entry.on_replicas.into(),
                entry.on_primary.into(),
                mean.into(),
                entry.longest.into(),
                entry.total.into(),
                (&*entry.text).into(),
            ]
        }))
    }

    fn config(&self) -> Rows {
        let settings = self.console.shared.config.load().given.settings();
        Box::new(settings.into_iter().map(|setting| {
            vec![
                setting.key.into(),
                setting.value.into(),
                setting.default.into(),
                setting.source.label().into(),
                setting.applies.words().into(),
            ]
        }))
    }

    fn failover(&self) -> Rows {
        let shared = &self.console.shared;
        let (topology, config) = (shared.topology.load_full(), shared.config.load_full());
        let primary = topology.primary.map(|id| topology.node(id));
        let reachable = primary.map(|node| node.standing == Standing::Primary { reachable: true });
        let waits = [WaitFor::Primary, WaitFor::Gate].map(|what| Some(Wait::For(what)));
        let waiting = shared.sessions.all().iter().filter(|h| waits.contains(&h.facts.wait())).count();
        let mut rows = vec![
            ("epoch", shown(topology.epoch.0)),
            ("primary", primary.map(|node| &*node.name).into()),
            ("primary_reachable", reachable.map(yes_or_no).into()),
            ("timeline", topology.timeline.map(|t| t.to_string()).into()),
            ("statements_waiting", shown(waiting)),
            ("pause_timeout", shown(format!("{:?}", config.failover.pause_timeout))),
        ];
        rows.extend(failover_standing(&self.console.failover.status()));
        items(rows)
    }

    fn history(&self) -> Rows {
        let topology = self.console.shared.topology.load_full();
        let status = self.console.failover.status();
        // An epoch that has ended is in one of the two, or in both: what restarts forget, the record keeps.
        let mut epochs: Vec<u64> = topology.switches.iter().map(|switch| switch.from.0).collect();
        epochs.extend(status.history.iter().map(|past| past.epoch.0.saturating_sub(1)));
        epochs.sort_unstable();
        epochs.dedup();
        Box::new(epochs.into_iter().rev().map(move |epoch| {
            let switch = topology.switches.iter().find(|switch| switch.from.0 == epoch);
            let past = status.history.iter().find(|past| past.epoch.0 == epoch + 1);
            let old = past.map(|past| past.from).or(switch.map(|switch| switch.old_primary));
            vec![
                epoch.into(),
                past.map_or(Value::Null, |past| {
                    Value::Time(UNIX_EPOCH + Duration::from_millis(past.unix_ms))
                }),
                name(&topology, old),
                name(&topology, past.map(|past| past.to)),
                past.map(|past| past.planned).into(),
                switch.map(|switch| switch.old_timeline.0).into(),
                switch.and_then(|switch| switch.fork).map(|lsn| lsn.to_string()).into(),
                switch.and_then(|switch| switch.last_sample).map(|(_, lsn)| lsn.to_string()).into(),
                past.map(|past| past.lost_acked_bytes_min).into(),
                past.map(|past| Duration::from_millis(past.took_ms)).into(),
            ]
        }))
    }

    fn topology(&self) -> Rows {
        let shared = &self.console.shared;
        let topology = shared.topology.load_full();
        let names = |wanted: &dyn Fn(&NodeView) -> bool| {
            let names: Vec<&str> =
                topology.nodes.iter().filter(|node| wanted(node)).map(|node| &*node.name).collect();
            if names.is_empty() { Value::Null } else { names.join(", ").into() }
        };
        let of_role = |role: &'static str| names(&move |node: &NodeView| role_label(&node.standing) == role);
        items(vec![
            ("system_identifier", topology.system_identifier.map(|id| id.to_string()).into()),
            ("epoch", shown(topology.epoch.0)),
            ("primary", name(&topology, topology.primary)),
            ("timeline", topology.timeline.map(|t| t.to_string()).into()),
            ("primary_started", topology.start.as_deref().into()),
            ("replicas", of_role("replica")),
            ("excluded", of_role("excluded")),
            ("drained", names(&|node| shared.topology.is_drained(node.id))),
            ("changes", shown(shared.topology.changes())),
        ])
    }

    fn version(&self) -> String {
        format!("Highwater {} (admin console)", env!("CARGO_PKG_VERSION"))
    }

    /// What drivers ask for.
    pub(super) fn scalars(&self, scalars: &[Scalar]) -> Reply {
        let columns: Vec<Column> = scalars.iter().map(scalar_column).collect();
        let row: Vec<Value> = scalars.iter().map(|scalar| self.scalar(&scalar.what)).collect();
        Reply::Rows { columns, rows: Box::new(std::iter::once(row)), tag: "SELECT" }
    }

    fn scalar(&self, what: &Asked) -> Value {
        match what {
            Asked::Number(number) => Value::Int(*number),
            Asked::Text(text) => text.clone().into(),
            // PostgreSQL's own form, which some drivers read.
            Asked::Version => {
                format!("PostgreSQL {} on the admin console", self.parameter("server_version")).into()
            }
            Asked::Database => DATABASE.into(),
            Asked::User => (&*self.handle.facts.identity.user).into(),
            Asked::Pid => self.handle.pid.into(),
            Asked::InRecovery => false.into(),
            Asked::Now => Value::Time(SystemTime::now()),
            Asked::Setting(name, None) => self.parameter(name).into(),
            Asked::Setting(name, Some(divisor)) => {
                self.parameter(name).parse::<i64>().map_or(Value::Null, |n| Value::Int(n / divisor))
            }
        }
    }

    /// `SHOW server_version` and kin.
    pub(super) fn show_parameter(&self, name: &str) -> Reply {
        let row = vec![self.parameter(name).into()];
        let columns = vec![column(name.to_owned(), Text)];
        Reply::Rows { columns, rows: Box::new(std::iter::once(row)), tag: "SHOW" }
    }

    /// A setting of a server, as drivers know it. The version is the primary's, so that tools that look for features
    /// are not misled about the servers behind.
    pub(super) fn parameter(&self, name: &str) -> String {
        let topology = self.console.shared.topology.load();
        let major = topology
            .primary
            .and_then(|id| topology.node(id).server_major)
            .or_else(|| topology.nodes.iter().find_map(|node| node.server_major))
            .unwrap_or(15);
        let known = PARAMETERS.iter().find(|known| known.eq_ignore_ascii_case(name)).copied();
        match known.unwrap_or_default() {
            "server_version" => format!("{major}.0 (Highwater {})", env!("CARGO_PKG_VERSION")),
            "server_version_num" => format!("{major}0000"),
            "server_encoding" | "client_encoding" => "UTF8".to_owned(),
            "application_name" => String::from_utf8_lossy(&self.handle.facts.application_name()).into_owned(),
            "session_authorization" => self.handle.facts.identity.user.to_string(),
            "DateStyle" => "ISO, MDY".to_owned(),
            "IntervalStyle" => "postgres".to_owned(),
            "TimeZone" => "UTC".to_owned(),
            "integer_datetimes" | "standard_conforming_strings" => "on".to_owned(),
            "transaction_isolation" | "default_transaction_isolation" => "read committed".to_owned(),
            "is_superuser" | "transaction_read_only" | "in_hot_standby" => "off".to_owned(),
            _ => String::new(),
        }
    }
}

fn items(items: Vec<(&'static str, Value)>) -> Rows {
    Box::new(items.into_iter().map(|(item, value)| vec![item.into(), value]))
}

/// Where failover stands, item by item.
fn failover_standing(status: &Status) -> Vec<(&'static str, Value)> {
    let since = status.since.elapsed().unwrap_or_default();
    let kept_out: Vec<String> =
        status.quarantined.iter().map(|(node, why)| format!("{node} ({})", why.label())).collect();
    let lost = status.loss.map(|loss| match loss.exact_bytes {
        Some(bytes) => format!("{bytes} bytes"),
        None => format!("{} bytes at least", loss.acked_bytes_min),
    });
    // A sentence a line: a terminal is only so wide.
    let promises = status.promises.split("; ").enumerate();
    let promises = promises.map(|(at, text)| (if at == 0 { "promises" } else { "" }, text.into()));
    let mut rows = vec![("mode", status.mode.into()), ("durability", status.durability.into())];
    rows.extend(promises);
    rows.extend([
        ("state", status.state.into()),
        ("state_for", shown(format_args!("{}s", since.as_secs()))),
        ("state_about", status.node.clone().into()),
        ("blocked", status.blocked.as_ref().map(|(word, why)| format!("{word}: {why}")).into()),
        ("paused", yes_or_no(status.paused)),
        ("cooling", yes_or_no(status.cooling)),
        ("writes_covered", yes_or_no(status.covered)),
        ("quarantined", Some(kept_out.join(", ")).filter(|names| !names.is_empty()).into()),
        ("last_loss", lost.into()),
    ]);
    if let Some(several) = &status.coordination {
        rows.extend([
            ("proxy", several.name.clone().into()),
            ("leader", several.leader.clone().into()),
            ("leads", yes_or_no(several.leads)),
            ("etcd_answers", yes_or_no(several.up)),
            ("lease", if several.valid { "valid" } else { "lapsed" }.into()),
            ("proxies", several.proxies.join(", ").into()),
        ]);
    }
    rows
}

fn yes_or_no(is: bool) -> Value {
    if is { "yes" } else { "no" }.into()
}

fn name(topology: &Topology, node: Option<NodeId>) -> Value {
    node.and_then(|id| topology.nodes.get(id.index())).map(|node| &*node.name).into()
}

/// A node's standing in a word, and why it is not used.
fn standing(standing: &Standing) -> (&'static str, Option<String>) {
    match standing {
        Standing::Primary { reachable: true } => ("serving", None),
        Standing::Primary { reachable: false } => ("unreachable", Some("its probes fail".to_owned())),
        Standing::Replica => ("serving", None),
        Standing::Excluded(why) => (why.label(), Some(why.to_string())),
    }
}

fn position(shared: &Arc<crate::session::Shared>, node: NodeId) -> Value {
    shared
        .positions
        .node(node)
        .latest()
        .map(|sample| match sample.body {
            SampleBody::Primary { insert, .. } => insert.to_string(),
            SampleBody::Replica { replay, .. } => replay.to_string(),
        })
        .into()
}

fn session(topology: &Topology, handle: &SessionHandle) -> Vec<Value> {
    let facts: &Facts = &handle.facts;
    let (sums, lasted) = (facts.sums(), facts.state_for());
    let pins: Vec<&str> = handle.pins().iter().map(|reason| reason.label()).collect();
    let application = String::from_utf8_lossy(&facts.application_name()).into_owned();
    vec![
        handle.pid.into(),
        facts.identity.kind.label().into(),
        (&*facts.identity.user).into(),
        (&*facts.identity.database).into(),
        Some(application).filter(|name| !name.is_empty()).into(),
        facts.identity.peer.map(|peer| peer.to_string()).into(),
        Value::Time(facts.connected),
        facts.state().label().into(),
        Value::Time(SystemTime::now().checked_sub(lasted).unwrap_or(facts.connected)),
        lasted.into(),
        facts.wait().map(Wait::label).into(),
        Some(pins.join(" ")).filter(|pins| !pins.is_empty()).into(),
        name(topology, facts.node()),
        facts.mark().map(|mark| mark.to_string()).into(),
        name(topology, facts.awaits()),
        sums.statements.into(),
        sums.received.into(),
        sums.sent.into(),
    ]
}

fn stats(database: &str, user: &str, sums: &Sums) -> Vec<Value> {
    let on_primary: u64 = sums.reads_on_primary.iter().sum();
    let waited: u64 = sums.waited.iter().sum();
    vec![
        database.into(),
        user.into(),
        sums.sessions.into(),
        sums.statements.into(),
        sums.reads_on_replicas.into(),
        on_primary.into(),
        said(&sums.reads_on_primary, |at| RouteReason::LABELS[at]),
        sums.statements.saturating_sub(sums.reads_on_replicas + on_primary).into(),
        sums.received.into(),
        sums.sent.into(),
        sums.waits.iter().sum::<u64>().into(),
        Duration::from_micros(waited).into(),
        said(&sums.waits, |at| Wait::ALL[at].label()),
    ]
}
