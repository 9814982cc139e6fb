//! When a client is ended that does nothing, or keeps a transaction open, for too long.
//!
//! There is one alarm per session, and only where a timeout is configured. It is not set anew with each
//! statement: when it rings, it is looked up whether anything is due by then, and if not it is put
//! forward. So a busy session pays one reading of the clock a statement, and an idle one rings once.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::config::TimeoutsConfig;
use crate::wire::{ErrorReport, TransactionStatus};

/// What has taken too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// No statement, outside a transaction.
    IdleSession,
    /// No statement, inside a transaction.
    IdleInTransaction,
    /// The transaction.
    Transaction,
}

impl Overdue {
    /// All labels.
    pub const LABELS: [&'static str; 3] =
        [Overdue::IdleSession.label(), Overdue::IdleInTransaction.label(), Overdue::Transaction.label()];

    /// One word for a metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Overdue::IdleSession => "idle_session",
            Overdue::IdleInTransaction => "idle_in_transaction",
            Overdue::Transaction => "transaction",
        }
    }

    /// What PostgreSQL says.
    pub fn report(self) -> ErrorReport {
        let (sqlstate, words) = match self {
            Overdue::IdleSession => ("57P05", "terminating connection due to idle-session timeout"),
            Overdue::IdleInTransaction => {
                ("25P03", "terminating connection due to idle-in-transaction timeout")
            }
            Overdue::Transaction => ("25P04", "terminating connection due to transaction timeout"),
        };
        ErrorReport::fatal(sqlstate, words)
    }
}

/// What is done about a unit whose transaction takes too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// Its statement is cancelled.
    Stop,
    /// Its session ends: the server does not answer, or waits for more of a batch itself.
    End,
}

/// How long a statement may take to be cancelled.
const GRACE: Duration = Duration::from_secs(2);

/// The timeouts of one session, and since when they run.
pub(super) struct Timeouts {
    limits: TimeoutsConfig,
    /// What the server has for this role and database; zero: none.
    server_idle_session: Duration,
    waiting_since: Instant,
    transaction_since: Option<Instant>,
    /// The running statement was told to stop, because of its transaction's age.
    stopped: bool,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Timeouts {
    /// None of them runs for longer than `limits` allow; the session begins now.
    pub(super) fn new(limits: TimeoutsConfig) -> Timeouts {
        Timeouts {
            limits,
            server_idle_session: Duration::ZERO,
            waiting_since: Instant::now(),
            transaction_since: None,
            stopped: false,
            alarm: None,
        }
    }

    /// The server's own `idle_session_timeout` for this role and database, which it cannot apply itself
    /// to connections that sessions share: the shorter of the two counts.
    pub(super) fn also_idle_session(&mut self, of_server: Duration) {
        self.server_idle_session = of_server;
        let ours = &mut self.limits.idle_session;
        if !of_server.is_zero() && (ours.is_zero() || of_server < *ours) {
            *ours = of_server;
        }
    }

    /// Other limits hold from now on, for who is waited for, too.
    pub(super) fn follow(&mut self, limits: TimeoutsConfig) {
        self.limits = limits;
        self.also_idle_session(self.server_idle_session);
        self.alarm = None;
    }

    fn any(&self) -> bool {
        let TimeoutsConfig { idle_session, idle_in_transaction, transaction } = &self.limits;
        !(idle_session.is_zero() && idle_in_transaction.is_zero() && transaction.is_zero())
    }

    /// A unit is about to run on a backend; `status` is the one before it.
    #[inline]
    pub(super) fn unit_runs(&mut self, status: TransactionStatus) {
        if !self.limits.transaction.is_zero() && status == TransactionStatus::Idle {
            self.transaction_since = Some(Instant::now());
        }
    }

    /// A unit has ended, and left `status`: the client is waited for.
    #[inline]
    pub(super) fn unit_ended(&mut self, status: TransactionStatus) {
        if self.any() {
            self.waiting_since = Instant::now();
            if status == TransactionStatus::Idle {
                self.transaction_since = None;
            }
        }
    }

    /// Whether a statement was stopped because of its transaction's age, since this was last asked.
    #[inline]
    pub(super) fn take_stopped(&mut self) -> bool {
        std::mem::take(&mut self.stopped)
    }

    /// While the client is waited for: `Ready` when that takes too long.
    pub(super) fn poll_waiting(&mut self, status: TransactionStatus, cx: &mut Context<'_>) -> Poll<Overdue> {
        if !self.any() {
            return Poll::Pending;
        }
        let due = due(&self.limits, status, self.waiting_since, self.transaction_since);
        self.poll_due(due, cx)
    }

    /// While a unit runs: `Ready` when its transaction takes too long, and once more when stopping it has
    /// not helped.
    #[inline]
    pub(super) fn poll_running(&mut self, cx: &mut Context<'_>) -> Poll<Measure> {
        let Some(since) = self.transaction_since else { return Poll::Pending };
        let (grace, measure) = match self.stopped {
            false => (Duration::ZERO, Measure::Stop),
            true => (GRACE, Measure::End),
        };
        match self.poll_due(Some((since + self.limits.transaction + grace, Overdue::Transaction)), cx) {
            Poll::Ready(_) => {
                self.stopped = true;
                Poll::Ready(measure)
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_due(&mut self, due: Option<(Instant, Overdue)>, cx: &mut Context<'_>) -> Poll<Overdue> {
        let Some((at, what)) = due else { return Poll::Pending };
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if alarm.deadline() > at {
            alarm.as_mut().reset(at);
        }
        loop {
            if Instant::now() >= at {
                return Poll::Ready(what);
            }
            match alarm.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                // It was set for an earlier statement.
                Poll::Ready(()) => alarm.as_mut().reset(at),
            }
        }
    }
}

/// When the first of the timeouts is over that run while a client is waited for, and which.
fn due(
    limits: &TimeoutsConfig,
    status: TransactionStatus,
    waiting_since: Instant,
    transaction_since: Option<Instant>,
) -> Option<(Instant, Overdue)> {
    let set = |limit: Duration| (!limit.is_zero()).then_some(limit);
    let (idle_limit, idle) = match status {
        TransactionStatus::Idle => (limits.idle_session, Overdue::IdleSession),
        _ => (limits.idle_in_transaction, Overdue::IdleInTransaction),
    };
    let idle = set(idle_limit).map(|limit| (waiting_since + limit, idle));
    let transaction = match (set(limits.transaction), transaction_since) {
        (Some(limit), Some(since)) if status != TransactionStatus::Idle => {
            Some((since + limit, Overdue::Transaction))
        }
        _ => None,
    };
    idle.into_iter().chain(transaction).min_by_key(|(at, _)| *at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use TransactionStatus::{Failed, Idle, InTransaction};

    #[test]
    fn the_first_that_is_over_counts_and_none_that_is_not_set() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let check = |limits: [u64; 3], status, waiting: u64, transaction: Option<u64>, expected| {
            let [idle_session, idle_in_transaction, transaction_limit] = limits.map(Duration::from_secs);
            let limits = TimeoutsConfig { idle_session, idle_in_transaction, transaction: transaction_limit };
            let found = due(&limits, status, at(waiting), transaction.map(at));
            assert_eq!(found, expected, "{limits:?} {status:?}");
        };
        check([0, 0, 0], Idle, 0, None, None);
        check([0, 0, 0], InTransaction, 0, Some(0), None);
        check([5, 0, 0], Idle, 10, None, Some((at(15), Overdue::IdleSession)));
        check([5, 0, 0], InTransaction, 10, Some(1), None);
        check([0, 5, 0], Idle, 10, None, None);
        check([0, 5, 0], Failed, 10, Some(1), Some((at(15), Overdue::IdleInTransaction)));
        check([0, 0, 5], InTransaction, 10, Some(9), Some((at(14), Overdue::Transaction)));
        check([0, 5, 5], InTransaction, 10, Some(9), Some((at(14), Overdue::Transaction)));
        check([0, 3, 5], InTransaction, 10, Some(9), Some((at(13), Overdue::IdleInTransaction)));
    }

    #[test]
    fn the_shorter_idle_timeout_counts() {
        let none = TimeoutsConfig {
            idle_session: Duration::ZERO,
            idle_in_transaction: Duration::ZERO,
            transaction: Duration::ZERO,
        };
        let mut timeouts = Timeouts::new(none);
        for (server, expected) in [(0, 0), (5, 5), (9, 5), (3, 3), (0, 3)] {
            timeouts.also_idle_session(Duration::from_secs(server));
            assert_eq!(timeouts.limits.idle_session, Duration::from_secs(expected));
        }
    }

    #[test]
    fn other_limits_leave_the_servers_own_in_force() {
        let of = |seconds| TimeoutsConfig {
            idle_session: Duration::from_secs(seconds),
            idle_in_transaction: Duration::ZERO,
            transaction: Duration::ZERO,
        };
        let mut timeouts = Timeouts::new(of(2));
        timeouts.also_idle_session(Duration::from_secs(5));
        for (ours, expected) in [(9, 5), (0, 5), (3, 3)] {
            timeouts.follow(of(ours));
            assert_eq!(timeouts.limits.idle_session, Duration::from_secs(expected));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_of_an_earlier_statement_ends_nobody() {
        let mut timeouts = Timeouts::new(TimeoutsConfig {
            idle_session: Duration::from_secs(3600),
            idle_in_transaction: Duration::ZERO,
            transaction: Duration::ZERO,
        });
        let poll = |timeouts: &mut Timeouts| {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            timeouts.poll_waiting(Idle, &mut cx)
        };
        assert!(poll(&mut timeouts).is_pending());
        let first = timeouts.alarm.as_ref().map(|alarm| alarm.deadline());
        timeouts.unit_ended(Idle);
        assert!(poll(&mut timeouts).is_pending());
        assert_eq!(timeouts.alarm.as_ref().map(|alarm| alarm.deadline()), first, "set anew for a statement");
        // It rings, and nothing is due.
        tokio::time::advance(Duration::from_secs(3601)).await;
        timeouts.unit_ended(Idle);
        assert!(poll(&mut timeouts).is_pending());
    }
}
