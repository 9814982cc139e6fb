//! A session before the gate: its new work for the primary waits while that is being changed.
//!
//! Promises: who waits has sent nothing, so waiting is safe, and an error afterwards says so; the wait is bounded in time
//! and in number; a cancel ends it. What is underway on the primary (a unit, a transaction) does not come here.

use std::time::{Duration, Instant};

use prometheus::IntGauge;

use super::facts::Wait;
use super::{End, Session, canceled};
use crate::gate::Posture;
use crate::metrics::WaitFor;
use crate::topology::NodeId;
use crate::wire::ErrorReport;

/// Why statements are not let to the primary, as the metric labels it.
pub const GATE_REFUSED_LABELS: [&str; 2] = [FULL, TIMEOUT];

const FULL: &str = "full";
const TIMEOUT: &str = "timeout";

/// Counted while it waits, however that ends.
struct Counted<'a>(&'a IntGauge);

impl<'a> Counted<'a> {
    fn by(gauge: &'a IntGauge) -> Counted<'a> {
        gauge.inc();
        Counted(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Session {
    /// Waits until new work may go to the primary. `Ok(Err(..))`: the unit fails with this report.
    pub(super) async fn pass_gate(&mut self, until: Instant) -> Result<Result<(), ErrorReport>, End> {
        if self.shared.gate.posture() == Posture::Open {
            return Ok(Ok(()));
        }
        // What it had there, if anything, is over: it comes as anybody else.
        self.presence.leave();
        let shared = self.shared.clone();
        let begun = Instant::now();
        let Some(mut place) = shared.gate.line_up() else {
            shared.metrics.gate_refused.inc(FULL);
            return Ok(Err(full(self.config.failover.max_paused)));
        };
        self.handle.facts.waits_for(Wait::For(WaitFor::Gate));
        let counted = Counted::by(&shared.metrics.gate_waiting);
        let not_cancelled = self.wait(place.let_in(), until).await;
        drop(counted);
        let time = begun.elapsed();
        shared.metrics.waited(WaitFor::Gate, time);
        self.handle.facts.waited(Wait::For(WaitFor::Gate), time);
        if !not_cancelled? {
            return Ok(Err(canceled()));
        }
        if Instant::now() >= until && shared.gate.posture() != Posture::Open {
            shared.metrics.gate_refused.inc(TIMEOUT);
            let what = match shared.gate.posture() {
                _ if shared.gate.is_lapsed() => "this proxy has lost touch with etcd",
                Posture::Paused => "the primary cannot be reached",
                _ => "the primary is being changed",
            };
            return Ok(Err(still_shut(what, self.config.failover.pause_timeout)));
        }
        Ok(Ok(()))
    }

    /// Resolves when the leased backend's connection is told to close.
    pub(super) async fn left(&self) -> NodeId {
        match &self.lease {
            Some(lease) => {
                lease.socket.closed().await;
                lease.node
            }
            None => std::future::pending().await,
        }
    }
}

fn still_shut(what: &str, pause: Duration) -> ErrorReport {
    ErrorReport::error("57P03", what)
        .detail(format!("Waited {pause:?} (failover.pause_timeout). The statement was not sent to any node."))
}

fn full(most: usize) -> ErrorReport {
    ErrorReport::error("53300", "too many statements wait for the primary, which is being changed")
        .detail(format!("{most} are waiting (failover.max_paused). The statement was not sent to any node."))
        .hint("Try again in a moment.")
}
