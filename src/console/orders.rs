//! What an administrator orders: answered when it is done, with what was done.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Asker;
use super::command::{Argument, Command, Failover};
use super::protocol::Reply;
use crate::config::live::Applies;
use crate::control::Command as Order;
use crate::session::facts::Kind;
use crate::session::handle::{CancelOutcome, Ending, SessionHandle};
use crate::session::pause;
use crate::topology::{NodeId, Standing};
use crate::wire::ErrorReport;

/// How often it is looked whether transactions have ended.
const LOOK: Duration = Duration::from_millis(10);

fn done(tag: &'static str, notices: Vec<String>) -> Reply {
    Reply::Done { tag, notices }
}

impl Asker<'_> {
    /// Does what a command asks for, and says what was done.
    pub(super) async fn answer(&self, command: &Command) -> Result<Reply, ErrorReport> {
        if is_order(command) {
            let user = &self.handle.facts.identity.user;
            tracing::info!(user = &**user, pid = self.handle.pid, ?command, "ordered on the admin console");
        }
        match command {
            Command::Table(table, pick) => self.show(*table, pick),
            Command::Parameter(name) => Ok(self.show_parameter(name)),
            Command::Scalars(scalars) => Ok(self.scalars(scalars)),
            Command::ExplainRoute { database, user, sql } => {
                self.explain(database.as_ref(), user.as_ref(), sql).await
            }
            Command::Pause(database) => self.pause(database.as_ref().map(Argument::text)).await,
            Command::Resume(database) => self.resume(database.as_ref().map(Argument::text)),
            Command::Drain(node) => self.drain(node.text()),
            Command::Undrain(node) => self.undrain(node.text()),
            Command::Kill(pid) => self.kill(pid.text()),
            Command::Cancel(pid) => self.cancel(pid.text()).await,
            Command::Reload => self.reload().await,
            Command::Failover(failover) => self.failover_command(failover).await,
            Command::Nothing(tag) => Ok(done(tag, Vec::new())),
            // Answered where the transaction is.
            Command::Begin | Command::Commit | Command::Rollback => Ok(done("BEGIN", Vec::new())),
        }
    }

    async fn pause(&self, database: Option<&str>) -> Result<Reply, ErrorReport> {
        let shared = &self.console.shared;
        let Some(new) = shared.pauses.pause(database) else {
            let most = pause::MOST;
            let report = ErrorReport::error("53400", format!("more than {most} databases are paused"));
            return Err(report.hint("PAUSE without a name pauses all."));
        };
        // Undone, however this ends, unless all transactions have ended.
        let undo = Undo { asker: self, database, armed: new };
        let patience = shared.config.load().pool.query_wait_timeout;
        let until = Instant::now() + patience;
        loop {
            let open: Vec<u32> = self.in_transaction(database).iter().map(|handle| handle.pid).collect();
            if open.is_empty() {
                break;
            }
            if Instant::now() >= until {
                let some: Vec<String> = open.iter().take(10).map(u32::to_string).collect();
                return Err(ErrorReport::error(
                    "55006",
                    "transactions did not end in time, nothing is paused",
                )
                .detail(format!(
                    "Waited {patience:?} (pool.query_wait_timeout) for {} sessions, among them {}.",
                    open.len(),
                    some.join(", ")
                ))
                .hint("SHOW SESSIONS shows them; KILL pid ends one."));
            }
            tokio::select! {
                biased;
                () = self.handle.interrupted() => {
                    return Err(ErrorReport::error("57014", "canceling statement due to user request"));
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
        undo.disarm();
        shared.pools.close_paused(database);
        Ok(done("PAUSE", Vec::new()))
    }

    fn in_transaction(&self, database: Option<&str>) -> Vec<Arc<SessionHandle>> {
        let mut all = self.console.shared.sessions.all();
        all.retain(|handle| {
            let identity = &handle.facts.identity;
            matches!(identity.kind, Kind::Client | Kind::ReadOnly)
                && database.is_none_or(|name| *identity.database == *name)
                && !handle.is_outside_transactions()
        });
        all
    }

    fn resume(&self, database: Option<&str>) -> Result<Reply, ErrorReport> {
        if self.console.shared.pauses.resume(database) {
            return Ok(done("RESUME", Vec::new()));
        }
        Err(match database {
            Some(name) if self.console.shared.pauses.holds(name) => {
                ErrorReport::error("55000", format!("database \"{name}\" is not paused by itself"))
                    .detail("All databases are paused.")
                    .hint("RESUME without a name.")
            }
            Some(name) => ErrorReport::error("55000", format!("database \"{name}\" is not paused")),
            None => ErrorReport::error("55000", "nothing is paused"),
        })
    }

    /// The node of this name.
    fn node(&self, name: &str) -> Result<NodeId, ErrorReport> {
        let topology = self.console.shared.topology.load();
        let found = topology.nodes.iter().find(|node| *node.name == *name).map(|node| node.id);
        found.ok_or_else(|| {
            let names: Vec<&str> = topology.nodes.iter().map(|node| &*node.name).collect();
            ErrorReport::error("42704", format!("node \"{name}\" does not exist"))
                .hint(format!("The nodes are {}.", names.join(", ")))
        })
    }

    fn drain(&self, name: &str) -> Result<Reply, ErrorReport> {
        let node = self.node(name)?;
        let shared = &self.console.shared;
        let topology = shared.topology.load_full();
        if topology.primary == Some(node) {
            return Err(ErrorReport::error("55000", format!("node \"{name}\" is the primary"))
                .detail("Only a replica can be drained.")
                .hint("SWITCHOVER makes another node the primary."));
        }
        let mut notices = Vec::new();
        if !shared.topology.drain(node, true) {
            notices.push(format!("node \"{name}\" is drained already"));
        }
        let others = topology.serving_replicas().any(|view| !shared.topology.is_drained(view.id));
        if !others {
            notices.push("no replica is left: reads run on the primary".to_owned());
        }
        if topology.node(node).standing != Standing::Replica {
            notices.push(format!("node \"{name}\" serves no reads now anyway"));
        }
        Ok(done("DRAIN", notices))
    }

    fn undrain(&self, name: &str) -> Result<Reply, ErrorReport> {
        let node = self.node(name)?;
        if self.console.shared.topology.drain(node, false) {
            return Ok(done("UNDRAIN", Vec::new()));
        }
        Err(ErrorReport::error("55000", format!("node \"{name}\" is not drained")))
    }

    fn session(&self, pid: &str) -> Result<Arc<SessionHandle>, ErrorReport> {
        let number = pid.parse::<u32>().map_err(|_| {
            ErrorReport::error("22P02", format!("invalid process id \"{pid}\""))
                .hint("SHOW SESSIONS shows them in the column pid.")
        })?;
        self.console.shared.sessions.get(number).ok_or_else(|| {
            ErrorReport::error("42704", format!("there is no session with process id {number}"))
                .hint("SHOW SESSIONS shows them in the column pid.")
        })
    }

    fn kill(&self, pid: &str) -> Result<Reply, ErrorReport> {
        self.session(pid)?.end(Ending::Now);
        Ok(done("KILL", Vec::new()))
    }

    async fn cancel(&self, pid: &str) -> Result<Reply, ErrorReport> {
        let handle = self.session(pid)?;
        let shared = &self.console.shared;
        let context = shared.pools.context.clone();
        let number = i32::try_from(handle.pid).unwrap_or(i32::MAX);
        let send = |target: Arc<crate::backend::CancelTarget>| async move { context.cancel(&target).await };
        match shared.sessions.cancel(number, &handle.key, send).await {
            CancelOutcome::Forwarded | CancelOutcome::WhileWaiting => Ok(done("CANCEL", Vec::new())),
            CancelOutcome::Nothing => {
                Ok(done("CANCEL", vec![format!("session {number} has nothing that could be cancelled")]))
            }
            CancelOutcome::Failed => {
                Err(ErrorReport::error("08006", "the node could not be told to cancel the statement"))
            }
        }
    }

    async fn reload(&self) -> Result<Reply, ErrorReport> {
        let report = self.console.reload.reload().await.map_err(|error| {
            ErrorReport::error("F0000", "the configuration was not reloaded")
                .detail(format!("{error}"))
                .hint("What was in force stays in force.")
        })?;
        let mut notices = vec![report.to_string()];
        if report.changes.iter().any(|change| change.applies == Applies::Restart) {
            notices.push("keys that take a restart keep their old values".to_owned());
        }
        notices.extend(report.warnings);
        Ok(done("RELOAD", notices))
    }

    async fn failover_command(&self, failover: &Failover) -> Result<Reply, ErrorReport> {
        let (tag, order) = self.order(failover)?;
        let answer = tokio::select! {
            biased;
            () = self.handle.interrupted() => {
                // Half of it may be done: it is carried to its end whoever waits.
                let report = ErrorReport::error("57014", "canceling statement due to user request");
                return Err(report.detail("What was ordered goes on.").hint("SHOW FAILOVER shows how far it is."));
            }
            answer = self.console.failover.give(order) => answer,
        };
        match answer {
            Ok(said) => Ok(done(tag, vec![said])),
            Err(why) => {
                let several = self.console.failover.status().coordination.clone();
                let leader = several.filter(|several| !several.leads).and_then(|several| several.leader);
                Err(ErrorReport::error("55000", why).hint(match leader {
                    Some(leader) => format!("Give the command on the admin console of \"{leader}\"."),
                    None => "SHOW FAILOVER and SHOW NODES show how things stand; docs/FAILOVER.md has each reason."
                        .to_owned(),
                }))
            }
        }
    }

    /// The order that a command stands for, and the tag of its answer.
    fn order(&self, failover: &Failover) -> Result<(&'static str, Order), ErrorReport> {
        let node = |name: &Argument| self.node(name.text());
        let maybe = |name: &Option<Argument>| name.as_ref().map(node).transpose();
        Ok(match failover {
            Failover::Switchover { to, dry_run, timeout } => {
                let timeout = timeout.as_ref().map(Argument::text).map(time).transpose()?;
                ("SWITCHOVER", Order::Switchover { to: maybe(to)?, dry_run: *dry_run, timeout })
            }
            Failover::Failover { to, allow_data_loss } => {
                ("FAILOVER", Order::Failover { to: maybe(to)?, allow_data_loss: *allow_data_loss })
            }
            Failover::Pause => ("PAUSE FAILOVER", Order::PauseFailover),
            Failover::Resume => ("RESUME FAILOVER", Order::ResumeFailover),
            Failover::Fence(name) => ("FENCE", Order::Fence(node(name)?)),
            Failover::Unfence(name) => ("UNFENCE", Order::Unfence(node(name)?)),
            Failover::Forget(name) => ("FORGET", Order::Forget(node(name)?)),
            Failover::AckRecovery => ("ACK RECOVERY", Order::AckRecovery),
        })
    }
}

fn time(text: &str) -> Result<Duration, ErrorReport> {
    crate::config::parse_duration(text).ok_or_else(|| {
        ErrorReport::error("22007", format!("invalid time \"{text}\"")).hint("A time is as 10s or 500ms.")
    })
}

/// Whether a command changes something, and so belongs in the log.
fn is_order(command: &Command) -> bool {
    matches!(
        command,
        Command::Pause(_)
            | Command::Resume(_)
            | Command::Drain(_)
            | Command::Undrain(_)
            | Command::Kill(_)
            | Command::Cancel(_)
            | Command::Reload
            | Command::Failover(_)
    )
}

/// Ends a pause that did not come about.
struct Undo<'a> {
    asker: &'a Asker<'a>,
    database: Option<&'a str>,
    armed: bool,
}

impl Undo<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.asker.console.shared.pauses.take_back(self.database);
        }
    }
}
