//! Whether a node may be relied on, from how its probes went. Pure.
//!
//! Hard evidence counts at once: where nobody listens no server runs. Soft evidence (no answer in time,
//! a broken connection, an error as answer) counts after some failures in a row. A server that says it
//! is starting is not dead. A node that was up and failed is *ejected*: it must answer again, and its
//! time must be over, which doubles while it flaps. Deliberately does not know roles: what ejection
//! means for a primary or a replica is `control`'s decision.

use std::time::{Duration, Instant};

use crate::config::Config;
use crate::node::{NodeError, NodeFailure};

/// The ejection time doubles at most this often: 16 times the configured one.
const MAX_DOUBLINGS: u32 = 4;

/// The part of the configuration that health goes by.
#[derive(Clone, Copy, Debug)]
pub struct HealthSettings {
    /// Soft failures in a row before a node counts as down.
    pub failure_threshold: u32,
    /// How long a node stays ejected the first time.
    pub eject_time: Duration,
}

impl HealthSettings {
    /// What the configuration says.
    pub fn of(config: &Config) -> HealthSettings {
        let failover = &config.failover;
        HealthSettings { failure_threshold: failover.failure_threshold, eject_time: failover.eject_time }
    }
}

/// Whether a node answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answering {
    /// It has not been asked, or has not failed often enough to tell.
    Unknown,
    /// Yes.
    Yes,
    /// It starts up, shuts down or recovers.
    Starting,
    /// No, and why.
    No(String),
}

/// One node's health.
#[derive(Clone, Debug)]
pub struct Health {
    answering: Answering,
    asked: bool,
    failures: u32,
    up_since: Option<Instant>,
    ejections: u32,
    ejected_until: Option<Instant>,
    ejected_for: String,
}

impl Default for Health {
    fn default() -> Health {
        Health {
            answering: Answering::Unknown,
            asked: false,
            failures: 0,
            up_since: None,
            ejections: 0,
            ejected_until: None,
            ejected_for: String::new(),
        }
    }
}

impl Health {
    /// A probe was answered.
    pub fn answered(&mut self, settings: HealthSettings, now: Instant) {
        self.asked = true;
        self.failures = 0;
        self.answering = Answering::Yes;
        let up_since = *self.up_since.get_or_insert(now);
        let calm = settings.eject_time.saturating_mul(1 << MAX_DOUBLINGS);
        if now.saturating_duration_since(up_since) >= calm {
            self.ejections = 0;
        }
    }

    /// A probe failed, or a session was refused a connection.
    pub fn failed(&mut self, error: &NodeError, settings: HealthSettings, now: Instant) {
        self.asked = true;
        self.failures = self.failures.saturating_add(1);
        match error.kind {
            // Of one session, so far; the next probe tells.
            NodeFailure::ShuttingDown => {}
            NodeFailure::Starting => self.down(Answering::Starting, &error.cause, settings, now),
            NodeFailure::Refused => {
                self.down(Answering::No(error.cause.clone()), &error.cause, settings, now)
            }
            NodeFailure::Timeout | NodeFailure::Broken | NodeFailure::Answered => {
                if self.failures >= settings.failure_threshold.max(1) || self.answering != Answering::Yes {
                    self.down(Answering::No(error.cause.clone()), &error.cause, settings, now);
                }
            }
        }
    }

    /// Whether it answers.
    pub fn answering(&self) -> &Answering {
        &self.answering
    }

    /// Whether any probe has ended, well or not.
    pub fn asked(&self) -> bool {
        self.asked
    }

    /// Why it is ejected at `now`; `None`: it is not.
    pub fn ejected(&self, now: Instant) -> Option<&str> {
        self.ejected_until.is_some_and(|until| now < until).then_some(&self.ejected_for)
    }

    fn down(&mut self, answering: Answering, cause: &str, settings: HealthSettings, now: Instant) {
        self.answering = answering;
        // One ejection for each time it goes down, however many failures follow.
        if self.up_since.take().is_some() {
            let time = settings.eject_time.saturating_mul(1 << self.ejections.min(MAX_DOUBLINGS));
            self.ejections = self.ejections.saturating_add(1);
            self.ejected_until = now.checked_add(time);
            self.ejected_for = cause.to_owned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SETTINGS: HealthSettings =
        HealthSettings { failure_threshold: 3, eject_time: Duration::from_secs(1) };

    fn error(kind: NodeFailure) -> NodeError {
        NodeError { node: "a".to_owned(), cause: kind.label().to_owned(), kind }
    }

    fn up(at: Instant) -> Health {
        let mut health = Health::default();
        health.answered(SETTINGS, at);
        health
    }

    #[test]
    fn a_refused_connection_counts_at_once_and_a_slow_answer_at_the_third_time() {
        let now = Instant::now();
        let mut refused = up(now);
        refused.failed(&error(NodeFailure::Refused), SETTINGS, now);
        assert_eq!(*refused.answering(), Answering::No("refused".to_owned()));
        for soft in [NodeFailure::Timeout, NodeFailure::Broken, NodeFailure::Answered] {
            let mut slow = up(now);
            for _ in 0..2 {
                slow.failed(&error(soft), SETTINGS, now);
                assert_eq!(*slow.answering(), Answering::Yes);
            }
            slow.failed(&error(soft), SETTINGS, now);
            assert_eq!(*slow.answering(), Answering::No(soft.label().to_owned()));
        }
    }

    #[test]
    fn an_answer_between_failures_starts_the_count_again() {
        let now = Instant::now();
        let mut health = up(now);
        for _ in 0..10 {
            health.failed(&error(NodeFailure::Timeout), SETTINGS, now);
            health.failed(&error(NodeFailure::Timeout), SETTINGS, now);
            health.answered(SETTINGS, now);
        }
        assert_eq!(*health.answering(), Answering::Yes);
        assert_eq!(health.ejected(now), None);
    }

    #[test]
    fn ejection_doubles_while_a_node_flaps_and_is_forgiven_after_calm() {
        let mut now = Instant::now();
        let mut health = up(now);
        for seconds in [1, 2, 4, 8, 16, 16, 16] {
            health.failed(&error(NodeFailure::Refused), SETTINGS, now);
            health.failed(&error(NodeFailure::Refused), SETTINGS, now);
            health.answered(SETTINGS, now);
            let time = Duration::from_secs(seconds);
            assert!(health.ejected(now + time - Duration::from_millis(1)).is_some(), "{seconds}");
            assert_eq!(health.ejected(now + time), None);
            now += time;
        }
        health.answered(SETTINGS, now + Duration::from_secs(60));
        health.failed(&error(NodeFailure::Refused), SETTINGS, now);
        assert_eq!(health.ejected(now + Duration::from_secs(1)), None);
    }

    #[test]
    fn a_node_that_was_never_up_is_not_ejected_when_it_comes() {
        let now = Instant::now();
        let mut health = Health::default();
        assert!(!health.asked());
        health.failed(&error(NodeFailure::Refused), SETTINGS, now);
        assert!(health.asked());
        health.answered(SETTINGS, now);
        assert_eq!((health.answering(), health.ejected(now)), (&Answering::Yes, None));
    }

    #[test]
    fn a_starting_server_is_not_dead() {
        let now = Instant::now();
        let mut health = up(now);
        health.failed(&error(NodeFailure::Starting), SETTINGS, now);
        assert_eq!(*health.answering(), Answering::Starting);
    }

    proptest! {
        #[test]
        fn ejection_is_bounded(events in prop::collection::vec((0u8..6, 0u64..5000), 0..200)) {
            let mut now = Instant::now();
            let mut health = Health::default();
            for (event, pause) in events {
                now += Duration::from_millis(pause);
                let kind = [NodeFailure::Refused, NodeFailure::Timeout, NodeFailure::Starting,
                            NodeFailure::Broken, NodeFailure::Answered];
                match kind.get(usize::from(event)) {
                    Some(kind) => health.failed(&error(*kind), SETTINGS, now),
                    None => health.answered(SETTINGS, now),
                }
                prop_assert_eq!(health.ejected(now + SETTINGS.eject_time * 16), None);
            }
        }
    }
}
