//! What systemd is told (`Type=notify`): that the proxy is ready, reloads, stops, and that it lives.
//!
//! Promises: without `NOTIFY_SOCKET` nothing happens; the watchdog is fed only while every thread that serves
//! has moved since the last time, so that one that hangs gets the process restarted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;

/// The proxy accepts clients; `status` is shown by `systemctl status`.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// A reload begins; [`ready`] ends it.
pub fn reloading() {
    // systemd tells reloads apart by this time.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "systemd could not be told of the reload"),
    }
}

/// The proxy ends; `status` says how.
pub fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

fn tell(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// The threads' signs of life, for the watchdog.
pub struct Pulse {
    beats: Vec<AtomicU64>,
    /// How long systemd waits for a sign; `None`: it does not ask.
    patience: Option<Duration>,
}

impl Pulse {
    /// Of so many threads, as systemd asks for it in the environment.
    pub fn new(threads: usize) -> Pulse {
        Pulse::with(threads, sd_notify::watchdog_enabled())
    }

    fn with(threads: usize, patience: Option<Duration>) -> Pulse {
        Pulse { beats: (0..threads).map(|_| AtomicU64::new(0)).collect(), patience }
    }

    /// Gives signs of life for `thread` for as long as it is polled; to be run on that thread.
    pub async fn beat(self: Arc<Self>, thread: usize) {
        let (Some(patience), Some(beats)) = (self.patience, self.beats.get(thread)) else { return };
        loop {
            beats.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(patience / 8).await;
        }
    }

    /// Feeds the watchdog while all threads live.
    pub async fn feed(self: Arc<Self>) {
        self.watch(|| tell(&[NotifyState::Watchdog])).await;
    }

    async fn watch(&self, mut alive: impl FnMut()) {
        let Some(patience) = self.patience else { return };
        let mut seen = vec![0; self.beats.len()];
        loop {
            tokio::time::sleep(patience / 3).await;
            let now: Vec<u64> = self.beats.iter().map(|beats| beats.load(Ordering::Relaxed)).collect();
            match now.iter().zip(&seen).position(|(now, seen)| now == seen) {
                None => alive(),
                Some(thread) => tracing::error!(thread, "a thread hangs: the watchdog is not fed"),
            }
            seen = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The clock is paused: it moves on when every task waits.
    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_while_all_threads_live_and_not_once_one_hangs() {
        let pulse = Arc::new(Pulse::with(2, Some(Duration::from_secs(8))));
        let first = tokio::spawn(pulse.clone().beat(0));
        let second = tokio::spawn(pulse.clone().beat(1));
        let fed = Arc::new(AtomicU64::new(0));
        let (counted, watched) = (fed.clone(), pulse.clone());
        tokio::spawn(async move { watched.watch(|| _ = counted.fetch_add(1, Ordering::Relaxed)).await });
        tokio::time::sleep(Duration::from_secs(80)).await;
        let so_far = fed.load(Ordering::Relaxed);
        // Twice within its patience, at least.
        assert!(so_far >= 20, "{so_far}");
        second.abort();
        tokio::time::sleep(Duration::from_secs(80)).await;
        // What had moved before it was looked at.
        assert!(fed.load(Ordering::Relaxed) <= so_far + 1);
        first.abort();
    }

    #[tokio::test]
    async fn without_a_watchdog_nobody_beats() {
        let pulse = Arc::new(Pulse::with(1, None));
        pulse.clone().beat(0).await;
        pulse.clone().feed().await;
        assert_eq!(pulse.beats[0].load(Ordering::Relaxed), 0);
    }
}
