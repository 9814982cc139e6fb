//! Cancelling what a backend runs, without ever hitting its next borrower.
//!
//! A CancelRequest travels on a connection of its own and takes effect whenever the server gets to
//! it: a backend that was given to somebody else meanwhile would have the wrong statement cancelled
//! (287 of 299 when tried). So a backend that was sent one serves nobody until the cancel connection
//! has ended *and* a round trip has passed on the backend itself (0 of 300).

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;

use crate::topology::NodeId;

/// The address of one backend for cancel requests.
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
    ended: Notify,
}

/// One cancel request on its way; while it lives, the backend is fenced.
pub struct Underway<'a>(&'a CancelTarget);

impl CancelTarget {
    /// For a fresh backend.
    pub fn new(node: NodeId, pid: i32, key: Vec<u8>) -> CancelTarget {
        CancelTarget {
            node,
            pid,
            key,
            underway: AtomicU32::new(0),
            sent: AtomicU32::new(0),
            ended: Notify::new(),
        }
    }

    /// Counts a request that is about to be sent. Call it while the session that holds the backend
    /// cannot give it back (under its handle's lock), and then [`underway`](Self::underway).
    pub fn announce(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
        self.underway.fetch_add(1, Ordering::SeqCst);
    }

    /// The end of an announced request: when it is dropped.
    pub fn underway(&self) -> Underway<'_> {
        Underway(self)
    }

    /// Whether a request was sent since the last [`fenced`](Self::fenced).
    pub fn was_sent(&self) -> bool {
        self.sent.load(Ordering::SeqCst) > 0
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
        self.0.underway.fetch_sub(1, Ordering::SeqCst);
        self.0.ended.notify_waiters();
    }
}
