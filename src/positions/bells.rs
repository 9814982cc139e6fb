//! Waking those who wait for a sample, thread by thread.
//!
//! To wake a task of another thread takes a system call each. Samples come from one thread, and on each worker many
//! sessions may wait; so a bell is rung once for each worker that has any, and a task of that worker passes it on.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// One bell for each worker, and one for whoever waits elsewhere.
pub(super) struct Bells {
    of_workers: Box<[Bell]>,
    elsewhere: Bell,
}

#[derive(Default)]
struct Bell {
    /// How often it has been rung.
    rings: AtomicU64,
    waiting: AtomicUsize,
    heard: Notify,
    rung: Notify,
    /// Whether a task of the worker passes on what is rung.
    passed_on: AtomicBool,
}

impl Bells {
    pub fn new(workers: usize) -> Bells {
        let of_workers = (0..workers).map(|_| Bell::default()).collect();
        Bells { of_workers, elsewhere: Bell::default() }
    }

    /// Wakes all who wait.
    pub fn ring(&self) {
        for bell in self.of_workers.iter().chain([&self.elsewhere]) {
            // Whoever begins to wait from here on sees that it has been rung; whoever waits already is seen.
            bell.rings.fetch_add(1, Ordering::SeqCst);
            if bell.waiting.load(Ordering::SeqCst) == 0 {
                continue;
            }
            if bell.passed_on.load(Ordering::SeqCst) {
                bell.rung.notify_one();
            } else {
                bell.heard.notify_waiters();
            }
        }
    }

    /// Resolves once it has been rung after this call. `worker`: whose task waits.
    pub fn next(&self, worker: Option<usize>) -> impl Future<Output = ()> + '_ {
        let bell = self.bell(worker);
        let before = bell.rings.load(Ordering::SeqCst);
        async move {
            let _waiting = Waiting::at(bell);
            // Apart, so that a session does not grow by it that is not waiting.
            let mut heard = Box::pin(bell.heard.notified());
            heard.as_mut().enable();
            if bell.rings.load(Ordering::SeqCst) == before {
                heard.await;
            }
        }
    }

    /// Passes on to the tasks of a worker's thread what is rung for them; on that thread, for ever.
    pub async fn pass_on(&self, worker: usize) {
        let bell = self.bell(Some(worker));
        let _until_the_end = PassesOn::at(bell);
        loop {
            bell.rung.notified().await;
            bell.heard.notify_waiters();
        }
    }

    fn bell(&self, worker: Option<usize>) -> &Bell {
        worker.and_then(|worker| self.of_workers.get(worker)).unwrap_or(&self.elsewhere)
    }
}

/// Somebody waits.
struct Waiting<'a>(&'a Bell);

impl Waiting<'_> {
    fn at(bell: &Bell) -> Waiting<'_> {
        bell.waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(bell)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The worker's task is there.
struct PassesOn<'a>(&'a Bell);

impl PassesOn<'_> {
    fn at(bell: &Bell) -> PassesOn<'_> {
        bell.passed_on.store(true, Ordering::SeqCst);
        PassesOn(bell)
    }
}

impl Drop for PassesOn<'_> {
    fn drop(&mut self) {
        self.0.passed_on.store(false, Ordering::SeqCst);
        // What was rung for it is not lost.
        self.0.heard.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    async fn resolves(future: impl Future<Output = ()>) -> bool {
        tokio::time::timeout(std::time::Duration::ZERO, future).await.is_ok()
    }

    #[tokio::test]
    async fn a_ring_between_the_call_and_the_first_look_is_heard() {
        let bells = Bells::new(1);
        for worker in [None, Some(0), Some(7)] {
            assert!(!resolves(bells.next(worker)).await);
            let next = bells.next(worker);
            bells.ring();
            assert!(resolves(next).await);
            assert!(!resolves(bells.next(worker)).await, "an old ring counts for nobody");
        }
        assert_eq!(bells.of_workers[0].waiting.load(Ordering::SeqCst), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_ring_is_lost_whoever_passes_it_on_or_has_just_gone() {
        let bells = Arc::new(Bells::new(1));
        let heard = Arc::new(AtomicU64::new(0));
        let sessions: Vec<_> = (0..4)
            .map(|_| {
                let (bells, heard) = (bells.clone(), heard.clone());
                tokio::spawn(async move {
                    for _ in 0..2000 {
                        let next = bells.next(Some(0));
                        heard.fetch_add(1, Ordering::SeqCst);
                        next.await;
                    }
                })
            })
            .collect();
        let mut passer = None;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        for round in 0.. {
            if sessions.iter().all(tokio::task::JoinHandle::is_finished) {
                break;
            }
            // Whoever has begun to wait is woken by one ring, and begins to wait again.
            let before = heard.load(Ordering::SeqCst);
            bells.ring();
            let ended = || sessions.iter().all(tokio::task::JoinHandle::is_finished);
            while heard.load(Ordering::SeqCst) == before && !ended() {
                assert!(std::time::Instant::now() < deadline, "nobody has heard a ring");
                tokio::task::yield_now().await;
            }
            if round % 64 == 0 {
                let bells = bells.clone();
                let old = passer.replace(tokio::spawn(async move { bells.pass_on(0).await }));
                if let Some(old) = old {
                    old.abort();
                    let _ = old.await;
                }
            }
        }
    }
}
