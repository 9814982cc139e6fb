//! Asking for a reload of the configuration, and what comes of it: the handle for SIGHUP and the admin console.
//!
//! Promises: one reload at a time, in the order in which they were asked for; a file that cannot be used changes
//! nothing. The work itself is done in `server::apply`, on the control plane's thread.

use std::fmt;

use tokio::sync::{mpsc, oneshot};

use crate::config::live::{Applies, Change, Membership};
use crate::config::{ConfigError, Problem};

/// Reloads that wait for their turn, at most; more would find the same file.
const QUEUE: usize = 8;

/// What a reload has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Keys whose values differ, and when each takes effect. A key that takes a restart has kept its value.
    pub changes: Vec<Change>,
    /// Nodes that were added, removed, or are otherwise not what they were.
    pub nodes: Vec<(String, Membership)>,
    /// What is accepted and has no effect, as `file:line:column: path: what`.
    pub warnings: Vec<String>,
}

impl Report {
    /// The keys that take effect in this way.
    pub fn keys(&self, applies: Applies) -> Vec<&'static str> {
        self.changes.iter().filter(|change| change.applies == applies).map(|change| change.key).collect()
    }
}

/// One line for people.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.changes.is_empty() {
            return f.write_str("nothing has changed");
        }
        let mut parts = Vec::new();
        for applies in [Applies::Live, Applies::NewSessions, Applies::Restart] {
            let keys = self.keys(applies);
            if !keys.is_empty() {
                parts.push(format!("{}: {}", applies.words(), keys.join(", ")));
            }
        }
        for (node, what) in &self.nodes {
            parts.push(format!("node {node} {}", what.word()));
        }
        f.write_str(&parts.join("; "))
    }
}

/// The answer to one who asked.
pub type Answer = Result<Report, ConfigError>;

/// The end of [`Reload`] that does the work.
pub type Asked = mpsc::Receiver<oneshot::Sender<Answer>>;

/// Asks for reloads. Cheap to clone; works on any runtime.
#[derive(Clone)]
pub struct Reload {
    ask: mpsc::Sender<oneshot::Sender<Answer>>,
}

impl Reload {
    /// The handle, and the end that does the work.
    pub fn new() -> (Reload, Asked) {
        let (ask, asked) = mpsc::channel(QUEUE);
        (Reload { ask }, asked)
    }

    /// Reads the file again and applies it. An error: each mistake with its place; what was in force stays in force.
    pub async fn reload(&self) -> Answer {
        let (tell, answer) = oneshot::channel();
        if self.ask.send(tell).await.is_err() {
            return Err(refused("the proxy is shutting down"));
        }
        answer.await.unwrap_or_else(|_| Err(refused("the proxy is shutting down")))
    }
}

/// A reason that has no place in the file.
pub fn refused(why: impl Into<String>) -> ConfigError {
    let problem = Problem { line: 0, column: 0, path: String::new(), message: why.into() };
    ConfigError { file: "reload".to_owned(), problems: vec![problem] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_as_one_line() {
        let change = |key, applies| Change { key, applies };
        let report = Report {
            changes: vec![
                change("pool.size", Applies::Live),
                change("listen", Applies::Restart),
                change("nodes", Applies::Live),
            ],
            nodes: vec![("c".to_owned(), Membership::Added)],
            warnings: Vec::new(),
        };
        assert_eq!(report.to_string(), "live: pool.size, nodes; restart: listen; node c added");
        assert_eq!(Report::default().to_string(), "nothing has changed");
    }

    #[tokio::test]
    async fn whoever_asks_too_late_is_told() {
        let (reload, asked) = Reload::new();
        drop(asked);
        assert!(reload.reload().await.unwrap_err().to_string().contains("shutting down"));
    }
}
