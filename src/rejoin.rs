//! `highwater rejoin` and `highwater clone`, run on a database host: an old primary (or a diverged standby) becomes a
//! replica again, and a new replica is made from a consistent copy.
//!
//! Promises: nothing is touched before everything has been looked at: the directory belongs to this cluster, no
//! server runs on it, there is one primary. What a step replaces is kept beside until the end, so that the command
//! can be given again after it was interrupted. Data that cannot be rewound is moved aside, not deleted. No password
//! is on a command line or in the output. As root, PostgreSQL's programs run as the owner of the directory.
//!
//! Deliberately starts the server only when told to: most hosts have a service manager that must do it.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::config::Config;
use crate::config::live::LiveConfig;
use crate::failover::conninfo::Conninfo;
use crate::failover::recipe::auto_conf;
use crate::net::NodeTls;
use crate::node::{ControlSession, NodeError, Nodes};
use crate::topology::NodeId;

/// How long a started replica may take to stream.
const STREAMING: Duration = Duration::from_secs(60);
/// How long a checkpoint on the primary may take.
const CHECKPOINT: Duration = Duration::from_secs(600);
/// Configuration that is the node's own, and that pg_rewind and pg_basebackup replace by the primary's.
const OWN_FILES: &[&str] = &["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"];

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The node's name in the configuration.
    pub node: String,
    /// Its data directory.
    pub data: PathBuf,
    /// Where PostgreSQL's programs are; `None`: on the PATH.
    pub bin: Option<PathBuf>,
    /// How it logs in to the primary for replication; `None`: as another node's `primary_conninfo` says.
    pub conninfo: Option<String>,
    /// A physical slot on the primary, made if it is missing.
    pub slot: Option<String>,
    /// Where the server's postgresql.conf is, if not in the data directory.
    pub config_file: Option<PathBuf>,
    /// Start the server with pg_ctl, and wait until it streams.
    pub start: bool,
    /// Only look, and say what would be done.
    pub dry_run: bool,
}

/// Why it was not done.
#[derive(Debug)]
pub enum RejoinError {
    /// It is not what it should be; nothing was changed.
    Refused(String),
    /// A node gave no answer, or this one.
    Node(NodeError),
    /// A program of PostgreSQL's failed; what it said was shown.
    Program(&'static str, ExitStatus),
    /// What was tried, where, and the system's answer.
    System(&'static str, PathBuf, io::Error),
}

impl fmt::Display for RejoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RejoinError::Refused(why) => f.write_str(why),
            RejoinError::Node(error) => error.fmt(f),
            RejoinError::Program(name, status) => write!(f, "{name} failed ({status})"),
            RejoinError::System(what, path, error) => write!(f, "cannot {what} {}: {error}", path.display()),
        }
    }
}

impl std::error::Error for RejoinError {}

impl From<NodeError> for RejoinError {
    fn from(error: NodeError) -> RejoinError {
        RejoinError::Node(error)
    }
}

fn refused<T>(why: impl Into<String>) -> Result<T, RejoinError> {
    Err(RejoinError::Refused(why.into()))
}

/// What is told while it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told<'a> {
    /// A step begins, or there is something to know.
    Line(&'a str),
    /// So much of what is being copied is there, in percent.
    Copied(u8),
}

/// Who is told.
pub type Tell<'a> = dyn FnMut(Told<'_>) + 'a;

fn say(tell: &mut Tell<'_>, line: &str) {
    tell(Told::Line(line));
}

/// Makes the data directory of a former member a replica of the current primary. `tell` gets a line before each step.
pub async fn rejoin(config: &Config, request: &Request, tell: &mut Tell<'_>) -> Result<(), RejoinError> {
    let mut job = Job::look(config, request, tell).await?;
    let facts = job.control_data().await?;
    if facts.system_identifier != job.source.system_identifier {
        return refused(format!(
            "{} belongs to another cluster (system identifier {}, the primary's is {}): nothing of it can be kept; \
             `highwater clone` fills an empty directory",
            request.data.display(),
            facts.system_identifier,
            job.source.system_identifier
        ));
    }
    job.refuse_running().await?;
    job.settle_conninfo().await?;
    say(
        tell,
        &format!(
            "{}: {}, on timeline {}; the primary is {}, on timeline {}",
            request.data.display(),
            facts.state,
            facts.timeline,
            job.source.name,
            job.source.timeline
        ),
    );
    let can_rewind = facts.checksums || facts.wal_log_hints;
    if request.dry_run {
        say(
            tell,
            match can_rewind {
                true => "pg_rewind would take back what the primary does not have",
                false => {
                    "it has neither data checksums nor wal_log_hints: it would be moved aside and copied anew"
                }
            },
        );
        return Ok(());
    }
    let kept = job.keep_own_files(tell)?;
    if can_rewind && job.rewind(tell).await? {
        job.put_back(&kept)?;
    } else {
        let aside = job.move_aside(tell)?;
        job.base_backup(tell).await?;
        job.put_back(&kept)?;
        say(tell, &format!("what was there before is in {}; delete it when all is well", aside.display()));
    }
    job.become_replica(tell, &[])?;
    job.finish(&kept, tell).await
}

/// Makes a new replica in an empty directory.
pub async fn clone(config: &Config, request: &Request, tell: &mut Tell<'_>) -> Result<(), RejoinError> {
    let mut job = Job::look(config, request, tell).await?;
    let empty = match fs::read_dir(&request.data) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(RejoinError::System("read", request.data.clone(), error)),
    };
    if !empty {
        return refused(format!(
            "{} is not empty: a copy is made into an empty directory",
            request.data.display()
        ));
    }
    job.settle_conninfo().await?;
    if request.dry_run {
        say(tell, &format!("pg_basebackup would copy {} into {}", job.source.name, request.data.display()));
        return Ok(());
    }
    job.base_backup(tell).await?;
    // The copy carries the configuration of the node that it was made from.
    let port = job.target_port.to_string();
    let own: &[(&str, &str)] = match request.data.join("postgresql.conf").exists() {
        true => &[("port", &port), ("cluster_name", &request.node)],
        false => &[],
    };
    job.become_replica(tell, own)?;
    let none = Kept { directory: PathBuf::new(), files: Vec::new() };
    job.finish(&none, tell).await
}

/// The primary, as it is found.
struct Source {
    id: NodeId,
    name: String,
    system_identifier: String,
    timeline: String,
    major: u32,
    host: String,
    port: u16,
}

struct Job<'a> {
    config: &'a Config,
    nodes: Arc<Nodes>,
    request: &'a Request,
    target: NodeId,
    target_port: u16,
    source: Source,
    /// How replicas log in, as the command line or another node tells.
    told: Option<String>,
    /// The same for this replica: its name and the primary's address included.
    conninfo: Option<Conninfo>,
    owner: Owner,
}

/// Whose the directory is.
#[derive(Clone, Copy)]
struct Owner {
    uid: u32,
    gid: u32,
    /// We are root and must become that user.
    change: bool,
}

/// What pg_controldata says of a directory.
struct ControlData {
    system_identifier: String,
    state: String,
    timeline: String,
    checksums: bool,
    wal_log_hints: bool,
}

struct Kept {
    directory: PathBuf,
    files: Vec<PathBuf>,
}

impl<'a> Job<'a> {
    /// All that can be known without the directory's content.
    async fn look(
        config: &'a Config,
        request: &'a Request,
        tell: &mut Tell<'_>,
    ) -> Result<Job<'a>, RejoinError> {
        let Some(index) = config.nodes.iter().position(|node| node.name == request.node) else {
            return refused(format!("the configuration has no node `{}`", request.node));
        };
        let target = NodeId(index as u16);
        let tls =
            NodeTls::new(&config.node_tls).map_err(|e| RejoinError::Refused(format!("node_tls: {e}")))?;
        let nodes = Nodes::new(LiveConfig::new(config.clone()), &tls);
        let (mut primaries, mut fenced) = (Vec::new(), Vec::new());
        let mut conninfos = Vec::new();
        for (index, node) in config.nodes.iter().enumerate() {
            let id = NodeId(index as u16);
            let deadline = config.pool.connect_timeout;
            let session = match nodes.session(id, "highwater rejoin", deadline).await {
                Ok(session) => session,
                Err(error) => {
                    // That this one does not answer is as it should be.
                    if id != target {
                        say(tell, &format!("{error}"));
                    }
                    continue;
                }
            };
            if id == target {
                return refused(format!(
                    "a server answers as {}: stop it first (pg_ctl stop -m fast, or its service)",
                    request.node
                ));
            }
            let row = facts(&session, config).await?;
            conninfos.push(row.conninfo.clone());
            if !row.in_recovery && row.read_only {
                // Another that was the primary once, and waits for its own turn.
                fenced.push(node.name.as_str());
            } else if !row.in_recovery {
                primaries.push(Source {
                    id,
                    name: node.name.clone(),
                    system_identifier: row.system_identifier,
                    timeline: row.timeline,
                    major: row.major,
                    host: node.replication.host.clone(),
                    port: node.replication.port,
                });
            }
        }
        let source = match <[Source; 1]>::try_from(primaries) {
            Ok([source]) => source,
            Err(none) if none.is_empty() && !fenced.is_empty() => {
                return refused(format!(
                    "of the nodes that answer none accepts writes: {} is no replica, but read-only (default_transaction_read_only)",
                    fenced.join(", ")
                ));
            }
            Err(none) if none.is_empty() => return refused("no node that answers is a primary"),
            Err(several) => {
                let names: Vec<_> = several.iter().map(|source| source.name.as_str()).collect();
                return refused(format!("several nodes accept writes: {}", names.join(", ")));
            }
        };
        for name in fenced {
            say(tell, &format!("{name} is no replica, but read-only: left out"));
        }
        let told = request.conninfo.clone().or_else(|| conninfos.into_iter().find(|text| !text.is_empty()));
        let owner = Owner::of(&request.data)?;
        let target_port = config.nodes[target.index()].replication.port;
        Ok(Job { config, nodes, request, target, target_port, source, told, conninfo: None, owner })
    }

    /// How this replica will log in; what the directory itself says counts last.
    async fn settle_conninfo(&mut self) -> Result<(), RejoinError> {
        let own = match &self.told {
            Some(_) => String::new(),
            None => {
                let mut command = self.program("postgres");
                command.args(["-C", "primary_conninfo", "-D"]).arg(&self.request.data);
                if let Some(file) = &self.request.config_file {
                    command.arg(format!("--config_file={}", file.display()));
                }
                let output = command.stdout(Stdio::piped()).stderr(Stdio::null()).output().await;
                let output = output.map_err(|e| self.cannot_run("postgres", e))?;
                String::from_utf8_lossy(&output.stdout).trim().to_owned()
            }
        };
        let text = self.told.clone().unwrap_or(own);
        if text.is_empty() {
            return refused(
                "no other node tells how replicas log in (primary_conninfo): give --conninfo 'user=... password=...'",
            );
        }
        let Ok(conninfo) = Conninfo::parse(&text) else {
            return refused("the connection string for replication cannot be read");
        };
        let mut conninfo = conninfo.towards(&self.source.host, self.source.port);
        conninfo.set("application_name", &self.request.node);
        self.conninfo = Some(conninfo);
        Ok(())
    }

    fn conninfo(&self) -> Result<Conninfo, RejoinError> {
        match &self.conninfo {
            Some(conninfo) => Ok(conninfo.clone()),
            None => refused("it is not settled how the replica logs in"),
        }
    }

    async fn control_data(&self) -> Result<ControlData, RejoinError> {
        let data = &self.request.data;
        let version = fs::read_to_string(data.join("PG_VERSION"))
            .map_err(|error| RejoinError::System("read", data.join("PG_VERSION"), error))?;
        if version.trim() != self.source.major.to_string() {
            return refused(format!(
                "{} is of PostgreSQL {}, the primary {} of {}",
                data.display(),
                version.trim(),
                self.source.name,
                self.source.major
            ));
        }
        let mut command = self.program("pg_controldata");
        command.arg("-D").arg(data).stdout(Stdio::piped());
        let output = command.output().await.map_err(|e| self.cannot_run("pg_controldata", e))?;
        if !output.status.success() {
            return Err(RejoinError::Program("pg_controldata", output.status));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let value = |label: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(label)?.trim_start().strip_prefix(':'));
            line.map(|value| value.trim().to_owned()).unwrap_or_default()
        };
        Ok(ControlData {
            system_identifier: value("Database system identifier"),
            state: value("Database cluster state"),
            timeline: value("Latest checkpoint's TimeLineID"),
            checksums: value("Data page checksum version") != "0",
            wal_log_hints: value("wal_log_hints setting") == "on",
        })
    }

    async fn refuse_running(&self) -> Result<(), RejoinError> {
        let mut command = self.program("pg_ctl");
        command.arg("status").arg("-D").arg(&self.request.data).stdout(Stdio::null());
        let status = command.status().await.map_err(|e| self.cannot_run("pg_ctl", e))?;
        match status.success() {
            true => refused(format!("a server runs on {}: stop it first", self.request.data.display())),
            false => Ok(()),
        }
    }

    /// Copies of the node's own configuration, beside the directory. Those of an interrupted attempt are the true
    /// ones: what is in the directory may be the primary's by now.
    fn keep_own_files(&self, tell: &mut Tell<'_>) -> Result<Kept, RejoinError> {
        let directory = beside(&self.request.data, "highwater-rejoin");
        let complete = directory.join("complete");
        if !complete.exists() {
            say(tell, &format!("keeping the node's own configuration in {}", directory.display()));
            fs::create_dir_all(&directory).map_err(|e| RejoinError::System("make", directory.clone(), e))?;
            for name in OWN_FILES {
                match fs::read(self.request.data.join(name)) {
                    Ok(content) => write_durably(&directory.join(name), &content, None)?,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => {
                        return Err(RejoinError::System("read", self.request.data.join(name), error));
                    }
                }
            }
            write_durably(&complete, b"", None)?;
        }
        let files = OWN_FILES.iter().map(|name| directory.join(name)).filter(|path| path.exists()).collect();
        Ok(Kept { directory, files })
    }

    fn put_back(&self, kept: &Kept) -> Result<(), RejoinError> {
        for file in &kept.files {
            let content = fs::read(file).map_err(|e| RejoinError::System("read", file.clone(), e))?;
            let name = file.file_name().unwrap_or_default();
            write_durably(&self.request.data.join(name), &content, Some(self.owner))?;
        }
        Ok(())
    }

    /// `false`: it cannot be rewound; the directory may be half changed and is good for nothing else then.
    async fn rewind(&self, tell: &mut Tell<'_>) -> Result<bool, RejoinError> {
        self.checkpoint(tell).await?;
        say(tell, &format!("pg_rewind: taking back what {} does not have", self.source.name));
        let mut command = self.program("pg_rewind");
        let source = format!(
            "host={} port={} user={} dbname={} application_name=highwater_rejoin",
            self.source.host, self.source.port, self.config.control.user, self.config.control.database
        );
        command.arg("--target-pgdata").arg(&self.request.data).arg("--progress");
        command.arg("--source-server").arg(source);
        if let Some(file) = &self.request.config_file {
            command.arg("--config-file").arg(file);
        }
        if let Some(password) = &self.config.control.password {
            command.env("PGPASSWORD", &password.0);
        }
        let status = self.copies("pg_rewind", command, tell).await?;
        if !status.success() {
            say(tell, "pg_rewind cannot do it (see above): the node is copied anew");
        }
        Ok(status.success())
    }

    /// Up to PostgreSQL 15 pg_rewind reads the primary's timeline from its last checkpoint, which after a promotion
    /// is one of the old timeline for minutes: it would find nothing to take back, and say that all is well.
    async fn checkpoint(&self, tell: &mut Tell<'_>) -> Result<(), RejoinError> {
        let deadline = self.config.pool.connect_timeout;
        let session = self.nodes.session(self.source.id, "highwater rejoin", deadline).await?;
        let timeline = "SELECT timeline_id FROM pg_control_checkpoint()";
        let shown = session.ask(timeline, deadline).await?.into_iter().flatten().flatten().next();
        if shown.as_ref() == Some(&self.source.timeline) {
            return Ok(());
        }
        say(tell, &format!("a checkpoint on {}, whose last one is of the timeline before", self.source.name));
        match session.ask("CHECKPOINT", CHECKPOINT).await {
            Ok(_) => Ok(()),
            Err(error) => refused(format!(
                "{error}: pg_rewind would go by an old checkpoint; run CHECKPOINT there as a superuser, then this again"
            )),
        }
    }

    fn move_aside(&self, tell: &mut Tell<'_>) -> Result<PathBuf, RejoinError> {
        let data = &self.request.data;
        let aside = beside(data, "before-rejoin");
        if aside.exists() {
            return refused(format!("{} is there already: move or delete it first", aside.display()));
        }
        say(tell, &format!("moving {} aside, to {}", data.display(), aside.display()));
        fs::rename(data, &aside).map_err(|error| RejoinError::System("move", data.clone(), error))?;
        Ok(aside)
    }

    async fn base_backup(&self, tell: &mut Tell<'_>) -> Result<(), RejoinError> {
        let data = &self.request.data;
        if !data.exists() {
            // By us: its parent need not be its owner's.
            let mut builder = fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.create(data).map_err(|e| RejoinError::System("make", data.clone(), e))?;
            self.owner.give(data)?;
        }
        say(tell, &format!("pg_basebackup: copying {} into {}", self.source.name, data.display()));
        let mut command = self.program("pg_basebackup");
        let mut conninfo = self.conninfo()?;
        if let Some(password) = conninfo.get("password").map(str::to_owned) {
            command.env("PGPASSWORD", password);
            conninfo.remove("password");
        }
        command.arg("--dbname").arg(conninfo.text()).arg("--pgdata").arg(data);
        command.args(["--wal-method=stream", "--checkpoint=fast", "--progress"]);
        let status = self.copies("pg_basebackup", command, tell).await?;
        if status.success() { Ok(()) } else { Err(RejoinError::Program("pg_basebackup", status)) }
    }

    /// The files that make a server a standby of the primary.
    fn become_replica(&self, tell: &mut Tell<'_>, own: &[(&str, &str)]) -> Result<(), RejoinError> {
        let data = &self.request.data;
        say(
            tell,
            &format!("writing postgresql.auto.conf and standby.signal: it follows {}", self.source.name),
        );
        let path = data.join("postgresql.auto.conf");
        let before = fs::read_to_string(&path).unwrap_or_default();
        let conninfo = self.conninfo()?.text();
        let mut settings = vec![("primary_conninfo", conninfo.as_str())];
        if let Some(slot) = &self.request.slot {
            settings.push(("primary_slot_name", slot));
        }
        settings.extend_from_slice(own);
        write_durably(&path, auto_conf(&before, &settings).as_bytes(), Some(self.owner))?;
        write_durably(&data.join("standby.signal"), b"", Some(self.owner))?;
        match fs::remove_file(data.join("recovery.signal")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(RejoinError::System("remove", data.join("recovery.signal"), error))
            }
            _ => Ok(()),
        }
    }

    async fn finish(&self, kept: &Kept, tell: &mut Tell<'_>) -> Result<(), RejoinError> {
        if let Some(slot) = &self.request.slot {
            self.make_slot(slot, tell).await?;
        }
        if !kept.files.is_empty() {
            fs::remove_dir_all(&kept.directory)
                .map_err(|e| RejoinError::System("remove", kept.directory.clone(), e))?;
        }
        let data = &self.request.data;
        if !self.request.start {
            say(
                tell,
                &format!(
                    "done; start the server by its service, or with: pg_ctl -D {} start",
                    data.display()
                ),
            );
            return Ok(());
        }
        say(tell, "starting the server");
        let mut command = self.program("pg_ctl");
        command.arg("start").arg("-D").arg(data).arg("-w").arg("-l").arg(data.join("start.log"));
        if let Some(file) = &self.request.config_file {
            command.arg("-o").arg(format!("-c config_file={}", file.display()));
        }
        let status = command.status().await.map_err(|e| self.cannot_run("pg_ctl", e))?;
        if !status.success() {
            return Err(RejoinError::Program("pg_ctl start", status));
        }
        self.wait_streaming(tell).await
    }

    async fn make_slot(&self, slot: &str, tell: &mut Tell<'_>) -> Result<(), RejoinError> {
        say(tell, &format!("the slot {slot} on {}", self.source.name));
        let deadline = self.config.pool.connect_timeout;
        let session = self.nodes.session(self.source.id, "highwater rejoin", deadline).await?;
        let name = slot.replace('\'', "''");
        let make = format!(
            "SELECT pg_create_physical_replication_slot('{name}', true) \
             WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{name}')"
        );
        session.ask(&make, deadline).await?;
        Ok(())
    }

    async fn wait_streaming(&self, tell: &mut Tell<'_>) -> Result<(), RejoinError> {
        let until = Instant::now() + STREAMING;
        let deadline = self.config.pool.connect_timeout;
        let question =
            "SELECT coalesce(bool_or(status = 'streaming'), false) FROM pg_stat_get_wal_receiver()";
        loop {
            let answer = match self.nodes.session(self.target, "highwater rejoin", deadline).await {
                Ok(session) => {
                    let rows = session.ask(question, deadline).await;
                    rows.map(|rows| rows.into_iter().flatten().flatten().next().unwrap_or_default())
                }
                Err(error) => Err(error),
            };
            match answer {
                Ok(streams) if streams == "t" => {
                    say(tell, &format!("{} streams from {}", self.request.node, self.source.name));
                    return Ok(());
                }
                Ok(_) if Instant::now() >= until => {
                    return refused("it is started, but does not stream yet: see its log");
                }
                Err(error) if Instant::now() >= until => return Err(error.into()),
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// A program of PostgreSQL's, as the directory's owner, with nothing of our environment but the PATH.
    fn program(&self, name: &str) -> Command {
        let path = self.request.bin.as_ref().map_or_else(|| PathBuf::from(name), |bin| bin.join(name));
        let mut command = Command::new(path);
        command.env_clear().env("LC_ALL", "C").stdin(Stdio::null()).current_dir("/");
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        if self.owner.change {
            command.uid(self.owner.uid).gid(self.owner.gid);
        }
        command
    }

    /// Runs a program that copies, and tells what it says and how far it is.
    async fn copies(
        &self,
        name: &'static str,
        mut command: Command,
        tell: &mut Tell<'_>,
    ) -> Result<ExitStatus, RejoinError> {
        let failed = |error| self.cannot_run(name, error);
        let mut child = command.stderr(Stdio::piped()).kill_on_drop(true).spawn().map_err(failed)?;
        if let Some(mut said) = child.stderr.take() {
            let (mut lines, mut chunk) = (Lines::default(), [0; 4096]);
            loop {
                match said.read(&mut chunk).await.map_err(failed)? {
                    0 => break,
                    read => lines.take(&chunk[..read], tell),
                }
            }
            lines.end(tell);
        }
        child.wait().await.map_err(failed)
    }

    fn cannot_run(&self, name: &'static str, error: io::Error) -> RejoinError {
        RejoinError::System("run", PathBuf::from(name), error)
    }
}

/// What a program of PostgreSQL's says on its standard error, cut into lines. A line is kept up to this length.
const LINE: usize = 4096;

#[derive(Default)]
struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    fn take(&mut self, bytes: &[u8], tell: &mut Tell<'_>) {
        for byte in bytes {
            match byte {
                // It moves the cursor back where it takes us for a terminal.
                b'\n' | b'\r' => self.end(tell),
                byte if self.begun.len() < LINE => self.begun.push(*byte),
                _ => {}
            }
        }
    }

    fn end(&mut self, tell: &mut Tell<'_>) {
        let line = String::from_utf8_lossy(&self.begun).trim().to_owned();
        self.begun.clear();
        match percent(&line) {
            Some(percent) => tell(Told::Copied(percent)),
            None if line.is_empty() => {}
            None => say(tell, &line),
        }
    }
}

/// `12345/67890 kB (18%), 0/1 tablespace`, `12345/67890 kB (18%) copied`.
fn percent(line: &str) -> Option<u8> {
    let (sizes, rest) = line.split_once(" kB (")?;
    if !sizes.bytes().all(|byte| byte.is_ascii_digit() || byte == b'/') {
        return None;
    }
    // What has grown meanwhile is more than all.
    rest.split_once("%)")?.0.trim().parse().ok().map(|percent: u8| percent.min(100))
}

impl Owner {
    fn of(data: &Path) -> Result<Owner, RejoinError> {
        let existing = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let metadata =
            fs::metadata(existing).map_err(|e| RejoinError::System("look at", existing.to_owned(), e))?;
        let us = nix::unistd::Uid::effective();
        let owner = Owner { uid: metadata.uid(), gid: metadata.gid(), change: us.is_root() };
        match (owner.uid, us.as_raw()) {
            (0, _) => refused(format!(
                "{} belongs to root: PostgreSQL runs as another user, who must own it",
                existing.display()
            )),
            (its, ours) if its != ours && !us.is_root() => refused(format!(
                "{} belongs to another user: run this as that user, or as root",
                existing.display()
            )),
            _ => Ok(owner),
        }
    }

    fn give(self, path: &Path) -> Result<(), RejoinError> {
        match self.change {
            true => chown(path, Some(self.uid), Some(self.gid))
                .map_err(|e| RejoinError::System("change the owner of", path.to_owned(), e)),
            false => Ok(()),
        }
    }
}

/// What a node that answers says.
struct NodeRow {
    in_recovery: bool,
    /// As the fence makes an old primary.
    read_only: bool,
    system_identifier: String,
    timeline: String,
    major: u32,
    conninfo: String,
}

async fn facts(session: &ControlSession, config: &Config) -> Result<NodeRow, RejoinError> {
    let question = "SELECT pg_is_in_recovery(), (SELECT system_identifier::text FROM pg_control_system()), \
                    CASE WHEN pg_is_in_recovery() THEN '' ELSE \
                      ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int::text END, \
                    current_setting('server_version_num')::int / 10000, \
                    CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') \
                      THEN current_setting('primary_conninfo') ELSE '' END, \
                    current_setting('default_transaction_read_only')";
    let rows = session.ask(question, config.pool.connect_timeout).await?;
    let text =
        |column: usize| rows.first().and_then(|row| row.get(column)).cloned().flatten().unwrap_or_default();
    Ok(NodeRow {
        in_recovery: text(0) != "f",
        system_identifier: text(1),
        timeline: text(2),
        major: text(3).parse().unwrap_or_default(),
        conninfo: text(4),
        read_only: text(5) == "on",
    })
}

/// `DIR.what`, beside `DIR`.
fn beside(data: &Path, what: &str) -> PathBuf {
    let mut name = data.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(what);
    data.with_file_name(name)
}

/// Replaces a file as a whole, readable by its owner only, on disk when this returns.
fn write_durably(path: &Path, content: &[u8], owner: Option<Owner>) -> Result<(), RejoinError> {
    let failed = |error| RejoinError::System("write", path.to_owned(), error);
    let new = beside(path, "new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(&new).map_err(failed)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)?;
    if let Some(owner) = owner {
        owner.give(&new)?;
    }
    fs::rename(&new, path).map_err(failed)?;
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::File::open(directory).and_then(|d| d.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_say_is_told_by_lines_and_their_progress_by_percent() {
        let said = b"pg_rewind: servers diverged at 0/3000060\n     0/24042 kB (0%) copied\r 24042/24042 kB \
            (100%) copied\nNOTICE:  all kB (5%) here\n\n 25000/24000 kB (104%), 1/1 tablespace\npg_rewind: Done!";
        // However it comes in.
        for size in [1, 7, said.len()] {
            let mut told = Vec::new();
            let mut tell = |what: Told<'_>| {
                told.push(match what {
                    Told::Line(line) => line.to_owned(),
                    Told::Copied(percent) => percent.to_string(),
                });
            };
            let mut lines = Lines::default();
            said.chunks(size).for_each(|chunk| lines.take(chunk, &mut tell));
            lines.end(&mut tell);
            let expected =
                ["pg_rewind: servers diverged at 0/3000060", "0", "100", "NOTICE:  all kB (5%) here", "100"];
            assert_eq!(told, [&expected[..], &["pg_rewind: Done!"]].concat());
        }
    }
}
