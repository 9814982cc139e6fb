//! Cancelling what a backend runs, without ever hitting its next borrower.
//!
//! A CancelRequest travels on a connection of its own and takes effect whenever the server gets to
//! it: a backend that was given to somebody else meanwhile would have the wrong statement cancelled
//! (287 of 299 when tried). So a backend that was sent one serves nobody until the cancel connection
//! has ended *and* a round trip has passed on the backend itself (0 of 300). A request whose end was not
//! seen (it failed, or nobody waited for it) may arrive at any time: its backend serves nobody else.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::senders::History;
use crate::topology::NodeId;

/// The address of one backend for cancel requests; and who may have notified under its process id.
#[derive(Debug)]
pub struct CancelTarget {
    /// The node.
    pub node: NodeId,
    /// The backend's process id.
    pub pid: i32,
    /// Its secret.
    pub key: Vec<u8>,
    underway: AtomicU32,
    sent: AtomicU32,
    /// A request went off whose end was not seen.
    astray: AtomicBool,
    ended: Notify,
    history: Mutex<History>,
}

/// One cancel request on its way; while it lives, the backend is fenced.
pub struct Underway<'a> {
    target: &'a CancelTarget,
    arrived: bool,
}

impl Underway<'_> {
    /// The node has ended the request's connection: it has taken effect, or never will.
    pub fn arrived(mut self) {
        self.arrived = true;
    }
}

impl CancelTarget {
    /// For a fresh backend.
    pub fn new(node: NodeId, pid: i32, key: Vec<u8>) -> CancelTarget {
        CancelTarget {
            node,
            pid,
            key,
            underway: AtomicU32::new(0),
            sent: AtomicU32::new(0),
            astray: AtomicBool::new(false),
            ended: Notify::new(),
            history: Mutex::default(),
        }
    }

    /// Who may have notified by way of this backend.
    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request that is about to be sent. Call it while the session that holds the backend
    /// cannot give it back (under its handle's lock), and then [`underway`](Self::underway).
    pub fn announce(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
        self.underway.fetch_add(1, Ordering::SeqCst);
    }

    /// The end of an announced request: when it is dropped.
    pub fn underway(&self) -> Underway<'_> {
        Underway { target: self, arrived: false }
    }

    /// Whether a request was sent since the last [`fenced`](Self::fenced).
    pub fn was_sent(&self) -> bool {
        self.sent.load(Ordering::SeqCst) > 0
    }

    /// Whether a request may still arrive, nobody knows when.
    pub fn is_astray(&self) -> bool {
        self.astray.load(Ordering::SeqCst)
    }

    /// Resolves when no request is on its way.
    pub async fn settled(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.underway.load(Ordering::SeqCst) == 0 {
                return;
            }
            ended.await;
        }
    }

    /// A round trip has passed after all requests had ended.
    pub fn fenced(&self) {
        self.sent.store(0, Ordering::SeqCst);
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        if !self.arrived {
            self.target.astray.store(true, Ordering::SeqCst);
        }
        self.target.underway.fetch_sub(1, Ordering::SeqCst);
        self.target.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_whose_end_was_not_seen_marks_its_backend_for_good() {
        let target = CancelTarget::new(NodeId(0), 1, vec![1]);
        target.announce();
        target.underway().arrived();
        target.settled().await;
        assert!(target.was_sent() && !target.is_astray());
        target.fenced();
        assert!(!target.was_sent());

        target.announce();
        drop(target.underway());
        target.settled().await;
        target.fenced();
        assert!(target.is_astray());
    }
}
