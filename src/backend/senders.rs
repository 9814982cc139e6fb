//! Which session a notification comes from.
//!
//! A notification carries the process id of the server process that sent it; clients know each other by
//! the ids that they were given at login. Many sessions use one server process in turn, and a
//! notification arrives a moment after its commit: so each backend remembers who ran on it, of late, what
//! may have notified (a trigger may, so: whatever is not a read). If that was one session alone, it is
//! the sender. If there were several, or none is known, nobody can tell: the listener is shown the server's
//! id, which is no session's. Nothing is remembered while nobody listens.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::CancelTarget;
use crate::topology::NodeId;

/// How long a notification may be on its way to a listener that waits for it.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// Sessions that a backend remembers.
const REMEMBERED: usize = 8;

/// Who ran on one backend what may have notified, the latest last.
#[derive(Debug, Default)]
pub struct History {
    turns: VecDeque<Turn>,
    /// The end of the latest turn that is not remembered any more.
    forgotten: Option<Instant>,
}

#[derive(Debug)]
struct Turn {
    session: u32,
    /// None: it is not over.
    until: Option<Instant>,
}

impl History {
    fn begins(&mut self, session: u32, now: Instant) {
        match self.turns.back_mut() {
            Some(last) if last.session == session => last.until = None,
            _ => {
                if self.turns.len() >= REMEMBERED
                    && let Some(oldest) = self.turns.pop_front()
                {
                    self.forgotten = Some(oldest.until.unwrap_or(now));
                }
                self.turns.push_back(Turn { session, until: None });
            }
        }
    }

    fn ends(&mut self, session: u32, now: Instant) {
        if let Some(last) = self.turns.back_mut()
            && last.session == session
        {
            last.until = Some(now);
        }
    }

    /// The only session that ran on it since `since`.
    fn only(&self, since: Instant) -> Option<u32> {
        if self.forgotten.is_some_and(|until| until >= since) {
            return None;
        }
        let mut sessions =
            self.turns.iter().filter(|turn| turn.until.is_none_or(|until| until >= since)).map(|t| t.session);
        let one = sessions.next()?;
        sessions.all(|other| other == one).then_some(one)
    }
}

/// The backends on which somebody may have notified.
#[derive(Debug, Default)]
pub struct Senders {
    listeners: AtomicUsize,
    backends: Mutex<HashMap<(NodeId, i32), Weak<CancelTarget>>>,
}

impl Senders {
    /// A session listens from now on.
    pub fn listens(&self) {
        self.listeners.fetch_add(1, Ordering::SeqCst);
    }

    /// It does not any more.
    pub fn listens_no_more(&self) {
        self.listeners.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether anybody listens.
    pub fn are_heard(&self) -> bool {
        self.listeners.load(Ordering::Relaxed) > 0
    }

    /// `session` begins what may notify.
    pub fn begins(&self, backend: &Arc<CancelTarget>, session: u32, now: Instant) {
        if !self.are_heard() {
            return;
        }
        let first = {
            let mut history = backend.history();
            let first = history.turns.is_empty();
            history.begins(session, now);
            first
        };
        if first {
            let mut backends = self.lock();
            backends.retain(|_, known| known.strong_count() > 0);
            backends.insert((backend.node, backend.pid), Arc::downgrade(backend));
        }
    }

    /// What it began is over.
    pub fn ends(&self, backend: &CancelTarget, session: u32, now: Instant) {
        if self.are_heard() {
            backend.history().ends(session, now);
        }
    }

    /// The session that has sent what a listener hears now, if that is certain. `deaf_since`: since when
    /// the listener may not have heard what was said; `listens_since`: before then it began to listen. What was
    /// committed before that, it does not hear.
    pub fn sender(
        &self,
        node: NodeId,
        pid: i32,
        deaf_since: Instant,
        listens_since: Option<Instant>,
    ) -> Option<u32> {
        let backend = self.lock().get(&(node, pid)).and_then(Weak::upgrade)?;
        let since = deaf_since.checked_sub(ON_ITS_WAY)?;
        backend.history().only(listens_since.map_or(since, |begun| begun.max(since)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(NodeId, i32), Weak<CancelTarget>>> {
        self.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_session_that_was_alone_is_the_sender() {
        let start = Instant::now() + Duration::from_secs(3600);
        let at = |ms| start + Duration::from_millis(ms);
        let mut history = History::default();
        assert_eq!(history.only(at(0)), None);
        history.begins(1, at(0));
        assert_eq!(history.only(at(5)), Some(1), "it is at it");
        history.ends(1, at(10));
        assert_eq!(history.only(at(5)), Some(1));
        assert_eq!(history.only(at(11)), None, "it was over before");
        history.begins(2, at(20));
        assert_eq!(history.only(at(5)), None, "either");
        assert_eq!(history.only(at(15)), Some(2));
        history.ends(2, at(30));
        history.begins(2, at(40));
        history.ends(2, at(50));
        assert_eq!(history.only(at(25)), Some(2));
        // What is forgotten may have been the one.
        for session in 3..=12 {
            history.begins(session, at(60));
            history.ends(session, at(60));
        }
        history.begins(13, at(1000));
        assert_eq!(history.turns.len(), REMEMBERED);
        assert_eq!(history.only(at(60)), None);
        assert_eq!(history.only(at(61)), Some(13));
    }

    #[test]
    fn nothing_is_remembered_while_nobody_listens() {
        let (senders, now) = (Senders::default(), Instant::now());
        let backend = Arc::new(CancelTarget::new(NodeId(0), 7, Vec::new()));
        senders.begins(&backend, 1, now);
        assert!(backend.history().turns.is_empty());
        senders.listens();
        senders.begins(&backend, 1, now);
        assert_eq!(senders.sender(NodeId(0), 7, now, None), Some(1));
        assert_eq!(senders.sender(NodeId(1), 7, now, None), None);
        drop(backend);
        assert_eq!(senders.sender(NodeId(0), 7, now, None), None);
    }

    #[test]
    fn who_was_done_before_the_listener_listened_is_not_the_sender() {
        let senders = Senders::default();
        let start = Instant::now() + Duration::from_secs(3600);
        let at = |ms| start + Duration::from_millis(ms);
        let backend = Arc::new(CancelTarget::new(NodeId(0), 7, Vec::new()));
        senders.listens();
        for (session, from, to) in [(1, 0, 10), (2, 20, 30)] {
            senders.begins(&backend, session, at(from));
            senders.ends(&backend, session, at(to));
        }
        let sender = |listens_since| senders.sender(NodeId(0), 7, at(40), listens_since);
        assert_eq!(sender(None), None);
        assert_eq!(sender(Some(at(10))), None, "it may have been just then");
        assert_eq!(sender(Some(at(15))), Some(2));
        assert_eq!(sender(Some(at(35))), None, "neither");
    }
}
