//! Log lines: where they go, how they look, and which there are; the last can be changed while the process runs.
//!
//! Promises: lines go to standard error, so that standard output is free for answers; lines about single
//! statements are bounded in number ([`Rate`]), whatever clients do. Deliberately does not decide what is worth a line.

use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, reload};

use crate::config::{LogConfig, LogFormat};

/// Libraries that tell of every notice and handshake; `log.level` may name them to hear them.
const QUIET: &str = "tokio_postgres=warn,rustls=warn,hyper=warn";

/// Which lines there are, to be changed while the process runs. Cheap to clone.
#[derive(Clone)]
pub struct Level(reload::Handle<EnvFilter, Registry>);

impl Level {
    /// From now on, `level` (`log.level`).
    pub fn set(&self, level: &str) {
        if let Err(error) = self.0.reload(filter(level)) {
            tracing::error!(%error, "log.level could not be changed");
        }
    }
}

fn filter(level: &str) -> EnvFilter {
    // The configuration has been checked to hold a valid filter; what stands later in it wins.
    EnvFilter::try_new(format!("{QUIET},{level}")).unwrap_or_else(|_| EnvFilter::new("info"))
}

/// Lines are written from now on, for the life of the process. Once.
pub fn start(log: &LogConfig) -> Level {
    let (filter, handle) = reload::Layer::new(filter(&log.level));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // Colours are for people; a file or a journal gets plain text.
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match log.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Level(handle)
}

/// So many lines in a second, and no more.
pub struct Rate {
    started: Instant,
    /// The second since `started` in the upper half, lines in it in the lower.
    state: AtomicU64,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate { started: Instant::now(), state: AtomicU64::new(0) }
    }
}

impl Rate {
    /// Whether one more line may be written in this second, of `most`.
    pub fn allows(&self, most: u32) -> bool {
        self.allows_in(self.started.elapsed().as_secs(), most)
    }

    fn allows_in(&self, second: u64, most: u32) -> bool {
        let now = second << 32;
        let taken = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
            let lines = if state >> 32 == second { state & u64::from(u32::MAX) } else { 0 };
            (lines < u64::from(most)).then_some(now | (lines + 1))
        });
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_so_many_lines_and_the_next_as_many() {
        let rate = Rate::default();
        let in_second = |second| (0..10).filter(|_| rate.allows_in(second, 3)).count();
        assert_eq!([in_second(0), in_second(0), in_second(1), in_second(7)], [3, 0, 3, 3]);
    }

    #[test]
    fn libraries_are_quiet_unless_they_are_named() {
        let text = |level| filter(level).to_string();
        assert!(text("debug").contains("tokio_postgres=warn"));
        assert!(text("info,tokio_postgres=debug").contains("tokio_postgres=debug"));
    }
}
