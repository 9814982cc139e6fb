//! What a login is told, when no earlier login like it is remembered: a node is logged in to and asked.
//!
//! Promises: a login that comes while its node crashes, restarts or is being replaced waits for another, or for that
//! one again, as a statement would (`failover.pause_timeout`), and then fails with 57P03; what a node itself refuses
//! is said at once, in its words. Nothing is lost by asking again: only questions of our own were sent.

use std::sync::Arc;
use std::time::Instant;

use bytes::BufMut;

use super::facts::Wait;
use super::place::{RETRY, unfit};
use super::{End, Session, canceled};
use crate::backend::pool::{AcquireError, Lease, Welcome};
use crate::backend::{Dirt, clean};
use crate::config::Transactions;
use crate::gate::Posture;
use crate::metrics::WaitFor;
use crate::topology::NodeId;
use crate::wire::{ErrorReport, Severity};

/// No node could be asked now.
struct NobodyNow;

impl Session {
    /// What a server reports to a login with these startup parameters, remembered for those to come.
    pub(super) async fn find_welcome(&mut self) -> Result<Welcome, End> {
        let pause = self.config.failover.pause_timeout;
        let until = Instant::now() + pause;
        loop {
            let shared = self.shared.clone();
            let changed = shared.topology.changed();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Ok(mut lease) = self.lease_for_login().await?
                && let Ok(welcome) = self.ask_welcome(&mut lease).await
            {
                self.pools.remember_welcome(&lease, &welcome);
                // A server that crashes or stops just then has said so behind its answer.
                lease.give_back();
                return Ok(welcome);
            }
            if Instant::now() >= until {
                let report = ErrorReport::fatal("57P03", "no node is available for this login")
                    .detail(format!("Waited {pause:?} (failover.pause_timeout)."))
                    .hint("Look at the log for the state of the nodes.");
                return Err(End::fatal(report));
            }
            self.handle.facts.waits_for(Wait::For(WaitFor::Primary));
            if !self.wait(changed, until.min(Instant::now() + RETRY)).await? {
                return Err(fatal(canceled()));
            }
        }
    }

    /// Asks what the server does not report by itself.
    async fn ask_welcome(&self, lease: &mut Lease) -> Result<Welcome, clean::Broken> {
        if !lease.applied.entries().is_empty() {
            // What another session has set could change the answers, or keep them away.
            lease.dirt = lease.dirt.max(Dirt::State);
        }
        clean::clean(lease).await?;
        let idle_session_timeout = clean::idle_session_timeout(lease).await?;
        let routing = &self.config.routing;
        let isolation = if routing.transactions == Transactions::Split || routing.read_only_on_replicas {
            clean::default_isolation(lease).await?
        } else {
            Arc::default()
        };
        Ok(Welcome { parameters: lease.login_parameters.clone(), idle_session_timeout, isolation })
    }

    /// A backend for a login: the primary's, or while there is none, a replica's.
    async fn lease_for_login(&mut self) -> Result<Result<Lease, NobodyNow>, End> {
        let topology = self.shared.topology.load_full();
        let replicas: Vec<NodeId> =
            topology.serving_replicas().map(|v| v.id).filter(|node| !self.is_drained(*node)).collect();
        let closed = self.shared.gate.posture() == Posture::Closed;
        let primary = topology.primary.filter(|_| !self.read_only && !closed);
        let mut last = None;
        for node in primary.into_iter().chain(replicas) {
            match self.lease_from(node).await? {
                Ok(lease) => return Ok(Ok(lease)),
                Err(AcquireError::Refused { message, sqlstate }) if sqlstate != *b"57P03" => {
                    self.client.output.put_slice(&message);
                    return Err(End::NodeSaidFatal);
                }
                Err(error) => {
                    if let AcquireError::Unreachable { failure, .. } = &error {
                        self.shared.reports.report_failure(node, *failure);
                    }
                    last = Some(error);
                }
            }
        }
        match last {
            Some(AcquireError::Unfit(why)) => Err(fatal(unfit(&why))),
            // It has waited in line already.
            Some(AcquireError::Timeout) => Err(fatal(self.timed_out())),
            _ => Ok(Err(NobodyNow)),
        }
    }
}

fn fatal(mut report: ErrorReport) -> End {
    report.severity = Severity::Fatal;
    End::fatal(report)
}
