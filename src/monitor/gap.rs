//! Waiting for less than a millisecond.
//!
//! The runtime's timers count milliseconds and round up: a gap of one lasts up to two, and sessions wait for its end. A
//! timer of the kernel's own keeps to it. Where none can be had, the runtime's is used.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::net::unix::pipe;

/// Less is not worth two system calls.
const LEAST: Duration = Duration::from_micros(50);

/// One timer.
pub struct Gap(Option<Timer>);

/// A file descriptor that becomes readable when the time is over, and again when it is over the next time: so it need not be
/// read in between, which would be a system call for each gap. The runtime is given it as what it knows that is read like
/// one: the reading end of a pipe.
struct Timer {
    set: TimerFd,
    over: pipe::Receiver,
}

impl Timer {
    fn new() -> io::Result<Timer> {
        let set = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let over = pipe::Receiver::from_owned_fd_unchecked(set.as_fd().try_clone_to_owned()?)?;
        Ok(Timer { set, over })
    }

    async fn wait(&mut self, at: Instant, time: Duration) -> io::Result<()> {
        // An expiry that nobody has waited for is undone by this; but the runtime may have heard of it.
        self.set.set(Expiration::OneShot(time.into()), TimerSetTimeFlags::empty())?;
        loop {
            self.over.readable().await?;
            // Heard, and forgotten by the runtime.
            let _ = self.over.try_io(|| Err::<(), _>(io::ErrorKind::WouldBlock.into()));
            if Instant::now() + LEAST >= at {
                return Ok(());
            }
        }
    }
}

impl Default for Gap {
    fn default() -> Gap {
        Gap(Timer::new().ok())
    }
}

impl Gap {
    /// Resolves at `at`, a twentieth of a millisecond early at most.
    pub async fn until(&mut self, at: Instant) {
        let left = at.saturating_duration_since(Instant::now());
        if left < LEAST {
            return;
        }
        if let Some(timer) = &mut self.0
            && timer.wait(at, left).await.is_ok()
        {
            return;
        }
        tokio::time::sleep_until(at.into()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_gap_never_ends_early_and_can_be_waited_for_again() {
        let mut gap = Gap::default();
        assert!(gap.0.is_some());
        for micros in [0, 40, 300, 1200, 300] {
            let at = Instant::now() + Duration::from_micros(micros);
            gap.until(at).await;
            assert!(Instant::now() + LEAST >= at);
            // One that is given up leaves nothing behind.
            let long = gap.until(Instant::now() + Duration::from_secs(3600));
            assert!(tokio::time::timeout(Duration::ZERO, long).await.is_err());
        }
    }
}
