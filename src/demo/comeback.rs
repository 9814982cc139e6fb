//! What somebody has to do on the database hosts after a change of the primary, done by the demo: the old primary is
//! stopped, rewound and started as a replica, as `highwater rejoin` does it.

use std::path::PathBuf;
use std::sync::Arc;

use super::cluster::PrivateNode;
use super::{DemoError, say};
use crate::config::Config;
use crate::rejoin::{self, Request, Told};

/// The hosts of the demo's nodes.
pub(super) struct Hosts {
    nodes: Vec<Arc<PrivateNode>>,
    /// PostgreSQL's programs.
    bin: PathBuf,
    /// The proxy's configuration.
    config: PathBuf,
    /// The primary, as it was known last.
    primary: Option<String>,
}

impl Hosts {
    pub(super) fn new(nodes: &[Arc<PrivateNode>], bin: PathBuf, config: PathBuf) -> Hosts {
        Hosts { nodes: nodes.to_vec(), bin, config, primary: None }
    }

    /// Who was the primary, and is not any more, now that `primary` is and all is settled.
    pub(super) fn replaced_by(&mut self, primary: &str) -> Option<Comeback> {
        let old = self.primary.replace(primary.to_owned()).filter(|old| old != primary)?;
        let node = self.nodes.iter().find(|node| node.name() == old)?.clone();
        Some(Comeback { node, new: primary.to_owned(), bin: self.bin.clone(), config: self.config.clone() })
    }
}

/// An old primary that is to be a replica.
pub(super) struct Comeback {
    node: Arc<PrivateNode>,
    new: String,
    bin: PathBuf,
    config: PathBuf,
}

impl Comeback {
    /// Does it. What cannot be done is said; the demo goes on without this node.
    pub(super) async fn carry_out(self) -> Result<(), DemoError> {
        let (old, new) = (self.node.name().to_owned(), self.new.clone());
        say(&format!(
            "{new} is the primary now, and {old} is kept out until it is a replica of it. On its host one would run"
        ))?;
        say(&format!(
            "  highwater rejoin -c config.yaml --node {old} --data {}",
            self.node.data().display()
        ))?;
        match self.rejoin().await {
            Ok(()) => say(&format!("{old} is a replica of {new}")),
            Err(why) => say(&format!("{old} did not come back: {why}")),
        }
    }

    async fn rejoin(self) -> Result<(), String> {
        let config = Config::load(&self.config).map_err(|error| error.to_string())?;
        if self.node.is_running() {
            self.node.stop_fast().await.map_err(|error| error.to_string())?;
        }
        let request = Request {
            node: self.node.name().to_owned(),
            data: self.node.data().to_owned(),
            bin: Some(self.bin),
            conninfo: None,
            slot: None,
            config_file: None,
            start: false,
            dry_run: false,
        };
        let mut tell = |told: Told<'_>| match told {
            Told::Line(line) => drop(say(&format!("  {line}"))),
            // It is over within a line of traffic.
            Told::Copied(_) => {}
        };
        rejoin::rejoin(&config, &request, &mut tell).await.map_err(|error| error.to_string())?;
        self.node.start().await.map_err(|error| error.to_string())
    }
}
