//! A private primary and replicas from the PostgreSQL on the machine: for `highwater demo`, and for
//! the tests, which also kill, freeze, delay and promote its servers.
//!
//! Promises: everything lives in one directory of its own and on ports of its own; passwords are
//! random; the servers run as an unprivileged user even when we are root (PostgreSQL refuses root);
//! and nothing is left behind, however this process ends. The last is the work of the *janitor*: a
//! small shell that makes the directory, holds the reading end of a pipe and, when the pipe closes
//! (on drop, exit or SIGKILL alike: the kernel closes it), stops every process that works in the
//! directory, frees their shared memory and removes it. A drop takes the same way and waits for it.
//!
//! Does not make data safe: `fsync` is off unless asked for, as a killed process needs none. Needs
//! Linux: a server's processes are found by their working directory in /proc, because PostgreSQL's
//! children each make a session of their own and leave no process group to signal.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User};
use rand::RngExt;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::port::ReservedPort;

/// A server starts, stops or answers within this, or it counts as failed.
const SERVER_DEADLINE: Duration = Duration::from_secs(60);

/// How often a state that is waited for is looked at.
const POLL: Duration = Duration::from_millis(10);

/// How much of a server's log an error shows.
const LOG_TAIL_LINES: usize = 20;

/// A socket's whole path must fit `sun_path` (108 bytes), `.s.PGSQL.31999` and its terminator too.
const MAX_HOME_PATH: usize = 80;

/// The file system in memory that Linux systems have.
const MEMORY: &str = "/dev/shm";

/// Bytes that must be free there: containers give 64 MiB by default, too little for servers.
const PLENTY: u64 = 4 << 30;

/// Runs under `sh -c`, as the servers' user. `$1`: the directory to make and, at the end, remove.
const JANITOR: &str = r#"
trap '' INT TERM HUP QUIT PIPE
cd /
umask 077
home=$1
mkdir "$home" || exit 1
echo ready
while read -r _; do :; done

# Everything that works in the directory, whether or not its parent still lives.
processes() {
    ls -ld /proc/[0-9]*/cwd 2>/dev/null | while read -r line; do
        case $line in
        *" -> $home" | *" -> $home/"*)
            pid=${line#*/proc/}
            printf '%s ' "${pid%%/*}" ;;
        esac
    done
}

# First the way that lets a server free its shared memory: immediate shutdown.
running=" $(processes) "
for file in "$home"/*/postmaster.pid; do
    [ -r "$file" ] && read -r pid <"$file" || continue
    # A number out of an old file may be somebody else's process by now.
    case $running in *" $pid "*) kill -QUIT "$pid" ;; esac
done 2>/dev/null
kill -CONT $running 2>/dev/null
tries=0
while running=$(processes); [ -n "$running" ] && [ $tries -lt 200 ]; do
    [ $tries -ge 100 ] && kill -KILL $running 2>/dev/null
    tries=$((tries + 1))
    sleep 0.03
done
# A server that was killed leaves its System V segment; line 7 of its pid file says which.
for file in "$home"/*/postmaster.pid; do
    [ -r "$file" ] || continue
    segment=$(sed -n '7s/.* //p' "$file")
    [ -n "$segment" ] && ipcrm -m "$segment"
done 2>/dev/null
rm -rf "$home"
"#;

/// What [`PrivateCluster::start`] is asked for.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Replicas beside the primary.
    pub replicas: usize,
    /// Lines for every node's postgresql.conf, after ours: name and value, quoted as PostgreSQL reads it.
    pub settings: Vec<(String, String)>,
    /// Whether commits are flushed to the disk. Only a power cut can tell the difference.
    pub fsync: bool,
    /// Text files for every node's data directory (mode 0600), such as certificates.
    pub files: Vec<(String, String)>,
    /// Whether this cluster gets a system identifier of its own, at the price of an `initdb`.
    pub identity: Identity,
}

/// Which system identifier a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The same as the others of this process: they are copies of one freshly made data directory.
    Shared,
    /// Its own, so that its nodes are strangers to any other cluster.
    Own,
}

impl Default for ClusterOptions {
    fn default() -> ClusterOptions {
        ClusterOptions {
            replicas: 2,
            settings: Vec::new(),
            fsync: false,
            files: Vec::new(),
            identity: Identity::Shared,
        }
    }
}

/// A private cluster could not be made, or a node did not do as it was told.
#[derive(Debug)]
pub enum ClusterError {
    /// No PostgreSQL server programs on this machine; the text says where was looked.
    NoPostgres(String),
    /// We are root, and there is no unprivileged user to run the servers as.
    NoUnprivilegedUser,
    /// A directory, file, port or process: what was tried, and the system's answer.
    System(String, io::Error),
    /// A program of PostgreSQL's failed: its name and what it said.
    Program(String, String),
    /// A server went away or did not become ready in time: its name and the end of its log.
    Server(String, String),
    /// A node refused a statement: its name and the error.
    Query(String, tokio_postgres::Error),
    /// Something waited for did not come true in time: what.
    Deadline(String),
}

impl fmt::Display for ClusterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClusterError::NoPostgres(looked) => write!(
                f,
                "no PostgreSQL server programs found ({looked}); install the package postgresql, or set \
                 HIGHWATER_PG_BIN to the directory that holds initdb and postgres"
            ),
            ClusterError::NoUnprivilegedUser => f.write_str(
                "PostgreSQL does not run as root, and neither of the users postgres and nobody exists to run it as",
            ),
            ClusterError::System(what, error) => write!(f, "{what}: {error}"),
            ClusterError::Program(name, said) => write!(f, "{name} failed: {said}"),
            ClusterError::Server(name, log) => {
                write!(f, "server {name} did not become ready; the end of its log:\n{log}")
            }
            ClusterError::Query(name, error) => match error.as_db_error() {
                Some(error) => write!(f, "node {name}: {} ({})", error.message(), error.code().code()),
                None => write!(f, "node {name}: {error}"),
            },
            ClusterError::Deadline(what) => write!(f, "gave up waiting: {what}"),
        }
    }
}

impl std::error::Error for ClusterError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ClusterError::System(_, error) => Some(error),
            ClusterError::Query(_, error) => Some(error),
            _ => None,
        }
    }
}

/// Adds what was being tried to a system error.
fn system<T>(what: impl fmt::Display, result: io::Result<T>) -> Result<T, ClusterError> {
    result.map_err(|error| ClusterError::System(what.to_string(), error))
}

/// A role of the private cluster, with its password.
#[derive(Clone, Debug)]
pub struct Login {
    /// Role name.
    pub user: String,
    /// Its password.
    pub password: String,
}

/// The roles that every private cluster has. All log in by SCRAM-SHA-256.
#[derive(Clone, Debug)]
pub struct Roles {
    /// The superuser `postgres`.
    pub superuser: Login,
    /// `highwater`, the proxy's own role, with no more rights than README.md asks for.
    pub control: Login,
    /// `app`, owner of the database `app`.
    pub app: Login,
    /// `replicator`, as which replicas stream.
    pub replicator: Login,
}

impl Roles {
    fn random() -> Roles {
        let login = |user: &str| Login { user: user.into(), password: random_name() };
        Roles {
            superuser: login("postgres"),
            control: login("highwater"),
            app: login("app"),
            replicator: login("replicator"),
        }
    }
}

/// 16 characters out of 0-9a-f: a password, or a name nobody else has.
fn random_name() -> String {
    format!("{:016x}", rand::rng().random::<u64>())
}

/// The directory of PostgreSQL's server programs: `HIGHWATER_PG_BIN`, else the newest version under
/// /usr/lib/postgresql (Debian's place), else where `pg_config` says.
pub fn find_postgres() -> Result<PathBuf, ClusterError> {
    let complete = |bin: &Path| bin.join("initdb").is_file() && bin.join("postgres").is_file();
    if let Some(named) = std::env::var_os("HIGHWATER_PG_BIN") {
        let named = PathBuf::from(named);
        return match complete(&named) {
            true => Ok(named),
            false => Err(ClusterError::NoPostgres(format!(
                "HIGHWATER_PG_BIN is {}, which holds no initdb and postgres",
                named.display()
            ))),
        };
    }
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            let bin = entry.path().join("bin");
            complete(&bin).then_some((version, bin))
        })
        .collect();
    versions.sort();
    if let Some((_, bin)) = versions.pop() {
        return Ok(bin);
    }
    if let Ok(output) = Command::new("pg_config").arg("--bindir").stdin(Stdio::null()).output() {
        let bin = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if complete(&bin) {
            return Ok(bin);
        }
    }
    Err(ClusterError::NoPostgres("looked into /usr/lib/postgresql/*/bin and asked pg_config".into()))
}

/// Whom the servers run as.
#[derive(Clone, Copy, Debug)]
enum RunAs {
    /// Ourselves: we are not root.
    Ourselves,
    /// Another user, as we are root.
    Other(Uid, Gid),
}

impl RunAs {
    fn find() -> Result<RunAs, ClusterError> {
        if !Uid::effective().is_root() {
            return Ok(RunAs::Ourselves);
        }
        ["postgres", "nobody"]
            .into_iter()
            .filter_map(|name| User::from_name(name).ok().flatten())
            .find(|user| !user.uid.is_root())
            .map(|user| RunAs::Other(user.uid, user.gid))
            .ok_or(ClusterError::NoUnprivilegedUser)
    }

    /// A command that runs as the servers' user, in a process group of its own (Ctrl-C at a terminal
    /// is ours alone to handle) and with an environment that holds nothing of ours.
    fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C").env("TZ", "UTC");
        command.stdin(Stdio::null()).process_group(0);
        if let RunAs::Other(uid, gid) = self {
            command.uid(uid.as_raw()).gid(gid.as_raw());
        }
        command
    }

    fn give(self, path: &Path) -> io::Result<()> {
        match self {
            RunAs::Ourselves => Ok(()),
            RunAs::Other(uid, gid) => chown(path, Some(uid.as_raw()), Some(gid.as_raw())),
        }
    }

    /// Writes a file that belongs to the servers' user and that nobody else reads.
    fn write(self, path: &Path, text: &str) -> Result<(), ClusterError> {
        use std::os::unix::fs::OpenOptionsExt;
        let write = || {
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
            file.write_all(text.as_bytes())?;
            self.give(path)
        };
        system(format_args!("cannot write {}", path.display()), write())
    }
}

/// Where to try to make a directory, best first: TMPDIR if set (though it may be too long for a socket,
/// or closed to the servers' user); memory where there is plenty, as copying a data directory there
/// takes a tenth of the time (measured: 0.06 s against 0.78 s on a virtual disk); the usual places.
fn parents() -> Vec<PathBuf> {
    let mut parents = Vec::new();
    if std::env::var_os("TMPDIR").is_some() {
        parents.push(std::env::temp_dir());
    }
    if let Ok(memory) = nix::sys::statvfs::statvfs(MEMORY)
        && memory.blocks_available().saturating_mul(memory.fragment_size()) >= PLENTY
    {
        parents.push(MEMORY.into());
    }
    parents.extend(["/tmp".into(), "/var/tmp".into()]);
    parents
}

/// The directory of a cluster, and the janitor that removes it.
#[derive(Debug)]
struct Home {
    path: PathBuf,
    run_as: RunAs,
    janitor: Child,
    /// Closing it sets the janitor to work.
    leash: Option<ChildStdin>,
}

impl Home {
    fn make(run_as: RunAs) -> Result<Home, ClusterError> {
        let mut failure = None;
        for parent in parents() {
            let path = parent.join(format!("hw-{}", random_name()));
            if path.as_os_str().len() > MAX_HOME_PATH {
                continue;
            }
            match Home::make_at(run_as, path) {
                Ok(home) => return Ok(home),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure
            .unwrap_or_else(|| ClusterError::Deadline("no usable directory for temporary files".into())))
    }

    fn make_at(run_as: RunAs, path: PathBuf) -> Result<Home, ClusterError> {
        let what = format!("cannot make {}", path.display());
        let mut command = run_as.command("/bin/sh");
        command.arg("-c").arg(JANITOR).arg("highwater-janitor").arg(&path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).current_dir("/");
        let mut janitor = system(&what, command.spawn())?;
        let leash = janitor.stdin.take();
        let mut answer = String::new();
        if let Some(stdout) = janitor.stdout.take() {
            system(&what, BufReader::new(stdout).read_line(&mut answer))?;
        }
        let home = Home { path, run_as, janitor, leash };
        match answer.as_str() {
            "ready\n" => Ok(home),
            _ => Err(ClusterError::System(what, io::ErrorKind::PermissionDenied.into())),
        }
    }

    /// Runs a program of PostgreSQL's to its end; its output is the error's text.
    fn run(&self, command: &mut Command, stdin: &str) -> Result<String, ClusterError> {
        let name =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        // In the directory, so that the janitor finds it.
        command.current_dir(&self.path).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = system(format_args!("cannot run {name}"), command.spawn())?;
        if let Some(mut pipe) = child.stdin.take() {
            // A program that ends early says why by its status; the broken pipe adds nothing.
            let _ = pipe.write_all(stdin.as_bytes());
        }
        let output = system(format_args!("cannot run {name}"), child.wait_with_output())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let said = format!("{text}{} ({})", String::from_utf8_lossy(&output.stderr), output.status);
        Err(ClusterError::Program(name, said))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.leash = None;
        // The janitor bounds its own waits (about 6 s), so this ends.
        let _ = self.janitor.wait();
    }
}

/// A freshly made and cleanly stopped data directory with our roles, to copy nodes from: `initdb`
/// takes longer than all else of a start together.
#[derive(Debug)]
struct Template {
    home: Home,
    roles: Roles,
}

impl Template {
    /// The one that clusters of this process share. Kept until the process ends (and the janitor with it).
    fn shared(bin: &Path) -> Result<Arc<Template>, ClusterError> {
        static SHARED: Mutex<Option<(PathBuf, Arc<Template>)>> = Mutex::new(None);
        let mut shared = lock(&SHARED);
        if let Some((made_by, template)) = &*shared
            && made_by == bin
        {
            return Ok(template.clone());
        }
        let template = Arc::new(Template::make(bin)?);
        *shared = Some((bin.to_owned(), template.clone()));
        Ok(template)
    }

    fn make(bin: &Path) -> Result<Template, ClusterError> {
        let run_as = RunAs::find()?;
        let home = Home::make(run_as)?;
        let roles = Roles::random();
        let password_file = home.path.join("password");
        run_as.write(&password_file, &roles.superuser.password)?;
        let data = home.path.join("data");
        let mut initdb = run_as.command(bin.join("initdb"));
        initdb.arg("-D").arg(&data).args(["-U", "postgres", "-A", "scram-sha-256", "--data-checksums"]);
        initdb.args(["--no-sync", "--encoding=UTF8", "--locale=C"]).arg("--pwfile").arg(&password_file);
        home.run(&mut initdb, "")?;

        // Single-user mode spares a start and a stop of the whole server. One command a line.
        let sql = |database: &str, lines: &str| {
            let mut single = run_as.command(bin.join("postgres"));
            single.args(["--single", "-j", "-F", "-c", "exit_on_error=on", "-D"]).arg(&data).arg(database);
            // With -j a command ends at a semicolon followed by an empty line.
            home.run(&mut single, &lines.replace('\n', "\n\n"))
        };
        sql("postgres", &roles_sql(&roles))?;
        sql("app", "GRANT ALL ON SCHEMA public TO app;\n")?;
        Ok(Template { home, roles })
    }

    fn data(&self) -> PathBuf {
        self.home.path.join("data")
    }
}

/// What the proxy's role is granted: what the documentation tells an operator to, no more and no less.
const GRANTS: &str = include_str!("../../docs/sql/grants.sql");

fn roles_sql(roles: &Roles) -> String {
    let Roles { control, app, replicator, .. } = roles;
    format!(
        "CREATE ROLE {control} LOGIN PASSWORD '{control_password}';\n{GRANTS}\
         CREATE ROLE {app} LOGIN PASSWORD '{app_password}';\n\
         CREATE ROLE {replicator} LOGIN REPLICATION PASSWORD '{replicator_password}';\n\
         CREATE DATABASE app OWNER {app};\n",
        control = control.user,
        control_password = control.password,
        app = app.user,
        app_password = app.password,
        replicator = replicator.user,
        replicator_password = replicator.password,
    )
}

/// A primary and its replicas, as they were started. Node 0 is the first primary; who is primary
/// later is for the nodes to say. Everything ends with this value.
#[derive(Debug)]
pub struct PrivateCluster {
    // The nodes go after the home: the janitor stops the servers, then the nodes reap them.
    home: Home,
    nodes: Vec<Arc<PrivateNode>>,
    roles: Roles,
    bin: PathBuf,
}

impl PrivateCluster {
    /// Makes and starts a cluster, and returns once every replica streams. `progress` gets a line
    /// before each step that takes time.
    pub async fn start(
        options: &ClusterOptions,
        progress: &mut (dyn FnMut(&str) + Send),
    ) -> Result<PrivateCluster, ClusterError> {
        let bin = find_postgres()?;
        progress(&format!("making a data directory with {}", bin.join("initdb").display()));
        let cluster = {
            let (options, bin) = (options.clone(), bin.clone());
            let made = tokio::task::spawn_blocking(move || PrivateCluster::make(&options, bin));
            made.await.map_err(|error| {
                ClusterError::System("making the cluster".into(), io::Error::other(error))
            })??
        };
        for node in &cluster.nodes {
            progress(&format!("starting {} on 127.0.0.1:{}", node.name, node.port()));
            node.spawn()?;
        }
        for node in &cluster.nodes {
            node.wait_ready().await?;
        }
        cluster.wait_streaming(options.replicas).await?;
        Ok(cluster)
    }

    /// All that comes before the first server starts.
    fn make(options: &ClusterOptions, bin: PathBuf) -> Result<PrivateCluster, ClusterError> {
        let template = match options.identity {
            Identity::Shared => Template::shared(&bin)?,
            Identity::Own => Arc::new(Template::make(&bin)?),
        };
        let home = Home::make(template.home.run_as)?;
        let mut nodes: Vec<Arc<PrivateNode>> = Vec::new();
        for index in 0..=options.replicas {
            let node = PrivateNode {
                name: node_name(index),
                port: system("no free port", ReservedPort::claim())?,
                data: home.path.join(node_name(index)),
                log: home.path.join(format!("{}.log", node_name(index))),
                bin: bin.clone(),
                run_as: home.run_as,
                roles: template.roles.clone(),
                process: Mutex::new(None),
                environment: Mutex::default(),
            };
            let mut copy = home.run_as.command("cp");
            copy.args(["-a", "--reflink=auto"]).arg(template.data()).arg(&node.data);
            home.run(&mut copy, "")?;
            node.configure(options, nodes.first().map(|primary| primary.port()))?;
            nodes.push(Arc::new(node));
        }
        Ok(PrivateCluster { home, nodes, roles: template.roles.clone(), bin })
    }

    /// Waits until `replicas` stream from node 0.
    async fn wait_streaming(&self, replicas: usize) -> Result<(), ClusterError> {
        let client = self.primary().admin().await?;
        let deadline = Instant::now() + SERVER_DEADLINE;
        loop {
            let count = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
            let row = client.query_one(count, &[]).await;
            let row = row.map_err(|error| ClusterError::Query(self.primary().name.clone(), error))?;
            if usize::try_from(row.get::<_, i64>(0)).is_ok_and(|streaming| streaming >= replicas) {
                return Ok(());
            }
            pause_until(deadline, || "the replicas to stream".into()).await?;
        }
    }

    /// The first primary.
    pub fn primary(&self) -> &Arc<PrivateNode> {
        &self.nodes[0]
    }

    /// All nodes: the first primary, then the replicas.
    pub fn nodes(&self) -> &[Arc<PrivateNode>] {
        &self.nodes
    }

    /// Node `index`; 0 is the first primary.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn node(&self, index: usize) -> &Arc<PrivateNode> {
        &self.nodes[index]
    }

    /// The roles and their passwords.
    pub fn roles(&self) -> &Roles {
        &self.roles
    }

    /// A program of the same PostgreSQL, for example `psql`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// A directory that ends with the cluster; it belongs to the servers' user.
    pub fn directory(&self) -> &Path {
        &self.home.path
    }

    /// A further role that may log in, with a password of its own.
    pub(super) async fn make_role(&self, name: &str) -> Result<Login, ClusterError> {
        let login = Login { user: name.to_owned(), password: random_name() };
        self.primary().execute(&format!("CREATE ROLE {name} LOGIN PASSWORD '{}'", login.password)).await?;
        Ok(login)
    }

    /// A directory within this one that nobody else reads, and that goes with it whoever writes into it.
    pub(super) fn private_directory(&self, name: &str) -> Result<PathBuf, ClusterError> {
        let path = self.home.path.join(name);
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        // What is in it belongs to us, the janitor removes it: it must own the directory.
        let given = made.and_then(|()| self.home.run_as.give(&path));
        system(format_args!("cannot make {}", path.display()), given)?;
        Ok(path)
    }

    /// Waits until every replica that runs has replayed all that node `of` has written by now.
    pub async fn wait_caught_up(&self, of: usize) -> Result<(), ClusterError> {
        let wal = self.node(of).query_text("SELECT pg_current_wal_flush_lsn()").await?;
        for (index, node) in self.nodes.iter().enumerate() {
            if index != of && node.is_running() {
                let reached = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{wal}', false)");
                node.wait_for(&reached, "t").await?;
            }
        }
        Ok(())
    }

    /// Ends all servers and removes all files; dropping the cluster does the same.
    pub fn stop(self) {}
}

/// `a`, `b`, `c`...
fn node_name(index: usize) -> String {
    match u8::try_from(index) {
        Ok(index @ 0..26) => char::from(b'a' + index).to_string(),
        _ => format!("n{index}"),
    }
}

/// One server of a [`PrivateCluster`]. All methods take `&self`: a test shares nodes between tasks.
#[derive(Debug)]
pub struct PrivateNode {
    name: String,
    port: ReservedPort,
    data: PathBuf,
    log: PathBuf,
    bin: PathBuf,
    run_as: RunAs,
    roles: Roles,
    /// The postmaster, while it is our child.
    process: Mutex<Option<Child>>,
    /// Variables that its next start gets beside ours.
    environment: Mutex<Vec<(String, String)>>,
}

impl PrivateNode {
    /// `a` is the first primary, replicas follow in the alphabet. It is also its `cluster_name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its TCP port on 127.0.0.1, the same across restarts.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Its whole server log so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    fn configure(&self, options: &ClusterOptions, primary: Option<u16>) -> Result<(), ClusterError> {
        let mut text = format!(
            "# Made by highwater for this run only.\n\
             listen_addresses = '127.0.0.1'\n\
             port = {port}\n\
             unix_socket_directories = '{home}'\n\
             cluster_name = '{name}'\n\
             max_connections = 100\n\
             shared_buffers = 32MB\n\
             dynamic_shared_memory_type = mmap\n\
             wal_level = replica\n\
             max_wal_senders = 16\n\
             max_replication_slots = 16\n\
             wal_keep_size = 128MB\n\
             max_wal_size = 256MB\n\
             hot_standby = on\n\
             wal_log_hints = on\n\
             wal_retrieve_retry_interval = 100ms\n\
             wal_receiver_status_interval = 1s\n\
             fsync = {fsync}\n\
             full_page_writes = {fsync}\n\
             logging_collector = off\n\
             log_destination = stderr\n\
             log_line_prefix = '%m [%p] %q%u@%d '\n",
            port = self.port(),
            home = quoted(&self.home().to_string_lossy()),
            name = self.name,
            fsync = if options.fsync { "on" } else { "off" },
        );
        if let Some(primary) = primary {
            text += &format!("primary_conninfo = '{}'\n", quoted(&self.conninfo(primary)));
        }
        for (name, value) in &options.settings {
            text += &format!("{name} = {value}\n");
        }
        self.run_as.write(&self.data.join("postgresql.conf"), &text)?;
        self.run_as.write(
            &self.data.join("pg_hba.conf"),
            "local all all scram-sha-256\n\
             host all all 127.0.0.1/32 scram-sha-256\n\
             host replication all 127.0.0.1/32 scram-sha-256\n",
        )?;
        for (name, text) in &options.files {
            self.run_as.write(&self.data.join(name), text)?;
        }
        match primary {
            Some(_) => self.run_as.write(&self.data.join("standby.signal"), ""),
            None => Ok(()),
        }
    }

    fn home(&self) -> &Path {
        self.data.parent().unwrap_or(&self.data)
    }

    /// How this node connects to its upstream on `port`.
    fn conninfo(&self, port: u16) -> String {
        let Login { user, password } = &self.roles.replicator;
        format!(
            "host=127.0.0.1 port={port} user={user} password={password} application_name={} connect_timeout=5",
            self.name
        )
    }

    /// Starts the server and returns once it answers a query.
    pub async fn start(&self) -> Result<(), ClusterError> {
        self.spawn()?;
        self.wait_ready().await
    }

    fn spawn(&self) -> Result<(), ClusterError> {
        let what = format!("cannot start server {}", self.name);
        let mut process = lock(&self.process);
        if let Some(running) = &mut *process
            && matches!(running.try_wait(), Ok(None))
        {
            return Ok(());
        }
        let log = system(&what, fs::OpenOptions::new().create(true).append(true).open(&self.log))?;
        let mut command = self.run_as.command(self.bin.join("postgres"));
        // PostgreSQL goes there by itself; from the start on it is where the janitor looks.
        command.current_dir(&self.data).arg("-D").arg(&self.data);
        command.envs(lock(&self.environment).iter().map(|(name, value)| (name, value)));
        command.stdout(system(&what, log.try_clone())?).stderr(log);
        *process = Some(system(&what, command.spawn())?);
        Ok(())
    }

    /// Waits until the server answers a query.
    pub async fn wait_ready(&self) -> Result<(), ClusterError> {
        let deadline = Instant::now() + SERVER_DEADLINE;
        loop {
            // A frozen or stuck server accepts and never answers, hence the bound on each attempt.
            let answer = tokio::time::timeout(Duration::from_secs(5), self.query_text("SELECT 1")).await;
            if matches!(&answer, Ok(Ok(one)) if one == "1") {
                return Ok(());
            }
            if !self.is_running() {
                return Err(ClusterError::Server(self.name.clone(), self.log_tail()));
            }
            let waited = pause_until(deadline, String::new).await;
            waited.map_err(|_| ClusterError::Server(self.name.clone(), self.log_tail()))?;
        }
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }

    /// Whether its postmaster lives (frozen counts as living).
    pub fn is_running(&self) -> bool {
        lock(&self.process).as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The postmaster's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        let mut process = lock(&self.process);
        let child = process.as_mut()?;
        matches!(child.try_wait(), Ok(None)).then(|| child.id())
    }

    /// All processes of the server, the postmaster first.
    fn processes(&self) -> Vec<Pid> {
        let postmaster = self.pid();
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == self.data) {
                pids.push(pid);
            }
        }
        pids.sort_by_key(|pid| Some(*pid) != postmaster);
        pids.into_iter().filter_map(|pid| i32::try_from(pid).ok()).map(Pid::from_raw).collect()
    }

    /// Sends `signal` to every process of the server until there is none that has not had it: a
    /// postmaster may fork while we look.
    fn signal_all(&self, signal: Signal) -> Result<(), ClusterError> {
        let mut reached: Vec<Pid> = Vec::new();
        loop {
            let fresh: Vec<Pid> = self.processes().into_iter().filter(|pid| !reached.contains(pid)).collect();
            if fresh.is_empty() {
                return Ok(());
            }
            for pid in fresh {
                // One that is gone already is no failure.
                let _ = kill(pid, signal);
                reached.push(pid);
            }
        }
    }

    /// Ends the server as a power cut of its machine would, but for the disk: SIGKILL to all its
    /// processes. Connections break at once.
    pub async fn crash(&self) -> Result<(), ClusterError> {
        // Stopped first, so that the postmaster neither forks nor cleans up while we go through the list.
        self.signal_all(Signal::SIGSTOP)?;
        self.signal_all(Signal::SIGKILL)?;
        self.wait_gone().await?;
        // The children die on their own time, and one that still dies keeps its sockets open.
        let deadline = Instant::now() + SERVER_DEADLINE;
        while !self.processes().is_empty() {
            pause_until(deadline, || format!("the processes of {} to end", self.name)).await?;
        }
        Ok(())
    }

    /// SIGKILL to the postmaster alone: its backends notice and leave by themselves, a busy one late.
    pub async fn crash_postmaster(&self) -> Result<(), ClusterError> {
        self.signal_postmaster(Signal::SIGKILL)?;
        self.wait_gone().await
    }

    /// `pg_ctl stop -m fast`: sessions are told 57P01, the WAL is flushed.
    pub async fn stop_fast(&self) -> Result<(), ClusterError> {
        self.signal_postmaster(Signal::SIGINT)?;
        self.wait_gone().await
    }

    /// `pg_ctl stop -m immediate`: no checkpoint, a crash that the next start recovers from.
    pub async fn stop_immediate(&self) -> Result<(), ClusterError> {
        self.signal_postmaster(Signal::SIGQUIT)?;
        self.wait_gone().await
    }

    /// Sets the variables that its next start gets beside ours.
    pub fn set_environment(&self, variables: &[(&str, &str)]) {
        *lock(&self.environment) =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    }

    /// Stops fast and starts again.
    pub async fn restart(&self) -> Result<(), ClusterError> {
        self.stop_fast().await?;
        self.start().await
    }

    fn signal_postmaster(&self, signal: Signal) -> Result<(), ClusterError> {
        let Some(pid) = self.pid().and_then(|pid| i32::try_from(pid).ok()) else { return Ok(()) };
        let sent = kill(Pid::from_raw(pid), signal).map_err(io::Error::from);
        system(format_args!("cannot signal server {}", self.name), sent)
    }

    async fn wait_gone(&self) -> Result<(), ClusterError> {
        let deadline = Instant::now() + SERVER_DEADLINE;
        while self.is_running() {
            pause_until(deadline, || format!("server {} to end", self.name)).await?;
        }
        Ok(())
    }

    /// SIGSTOP to all its processes: connections stay open and are accepted, nothing answers.
    pub fn freeze(&self) -> Result<(), ClusterError> {
        self.signal_all(Signal::SIGSTOP)
    }

    /// Lets a frozen server go on.
    pub fn thaw(&self) -> Result<(), ClusterError> {
        self.signal_all(Signal::SIGCONT)
    }

    /// SIGKILL to one backend: the postmaster answers by restarting the whole server in place, with
    /// the same process id and start time. Returns once it answers again.
    pub async fn crash_backend(&self) -> Result<(), ClusterError> {
        let (victim, witness) = (self.admin().await?, self.admin().await?);
        let row = victim.query_one("SELECT pg_backend_pid()", &[]).await;
        let pid: i32 = row.map_err(|error| ClusterError::Query(self.name.clone(), error))?.get(0);
        system(
            format_args!("cannot kill a backend of {}", self.name),
            kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(io::Error::from),
        )?;
        // The victim's own connection breaks before the postmaster has heard of its death, while new ones are still let
        // in. Another one is ended by the postmaster: from then on an answer comes from the restarted server.
        let deadline = Instant::now() + SERVER_DEADLINE;
        while !witness.is_closed() {
            pause_until(deadline, || format!("server {} to notice its dead backend", self.name)).await?;
        }
        self.wait_ready().await
    }

    /// Stops applying WAL on a replica; it goes on receiving.
    pub async fn pause_replay(&self) -> Result<(), ClusterError> {
        self.execute("SELECT pg_wal_replay_pause()").await?;
        // The request takes effect between two records.
        self.wait_for("SELECT pg_get_wal_replay_pause_state()", "paused").await
    }

    /// Applies WAL again.
    pub async fn resume_replay(&self) -> Result<(), ClusterError> {
        self.execute("SELECT pg_wal_replay_resume()").await
    }

    /// Applies each commit this long after the primary made it; zero: at once. In whole milliseconds.
    pub async fn set_apply_delay(&self, delay: Duration) -> Result<(), ClusterError> {
        self.set("recovery_min_apply_delay", &format!("{}ms", delay.as_millis())).await
    }

    /// Makes a replica a primary on a new timeline; returns once it takes writes.
    pub async fn promote(&self) -> Result<(), ClusterError> {
        self.execute("SELECT pg_promote(true, 60)").await?;
        self.wait_for("SELECT pg_is_in_recovery()", "f").await
    }

    /// Makes a running replica stream from `upstream`.
    pub async fn follow(&self, upstream: &PrivateNode) -> Result<(), ClusterError> {
        self.set("primary_conninfo", &self.conninfo(upstream.port())).await
    }

    /// Turns a stopped node into a replica of `upstream` by copying that one anew (what it held is lost).
    pub async fn rebuild_from(&self, upstream: &PrivateNode) -> Result<(), ClusterError> {
        let emptied = match fs::remove_dir_all(&self.data) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        };
        system(format_args!("cannot empty {}", self.data.display()), emptied)?;
        system(
            format_args!("cannot make {}", self.data.display()),
            fs::DirBuilder::new().mode(0o700).create(&self.data).and_then(|()| self.run_as.give(&self.data)),
        )?;
        let Login { user, password } = &self.roles.replicator;
        let mut copy = self.run_as.command(self.bin.join("pg_basebackup"));
        copy.args(["-h", "127.0.0.1", "-p", &upstream.port().to_string(), "-U", user])
            .arg("-D")
            .arg(&self.data);
        copy.args(["-X", "stream", "-c", "fast", "-R", "--no-sync"]).env("PGPASSWORD", password);
        copy.current_dir(&self.data).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = tokio::task::spawn_blocking(move || copy.output())
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)));
        let output = system("cannot run pg_basebackup", output)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(ClusterError::Program("pg_basebackup".into(), said));
        }
        // The copy carries the other one's name and port; the last line of a name wins.
        let conf = self.data.join("postgresql.conf");
        let mut text = system(format_args!("cannot read {}", conf.display()), fs::read_to_string(&conf))?;
        text += &format!("port = {}\ncluster_name = '{}'\n", self.port(), self.name);
        self.run_as.write(&conf, &text)?;
        let auto = self.data.join("postgresql.auto.conf");
        self.run_as
            .write(&auto, &format!("primary_conninfo = '{}'\n", quoted(&self.conninfo(upstream.port()))))?;
        self.start().await
    }

    /// `ALTER SYSTEM SET name = value`, and a reload that has reached new sessions when this returns.
    pub async fn set(&self, name: &str, value: &str) -> Result<(), ClusterError> {
        let client = self.admin().await?;
        let query = |error| ClusterError::Query(self.name.clone(), error);
        let before: String =
            client.query_one("SELECT pg_conf_load_time()::text", &[]).await.map_err(query)?.get(0);
        client
            .batch_execute(&format!("ALTER SYSTEM SET {name} = '{}'", quoted(value)))
            .await
            .map_err(query)?;
        client.batch_execute("SELECT pg_reload_conf()").await.map_err(query)?;
        let deadline = Instant::now() + SERVER_DEADLINE;
        loop {
            // A fresh session has what the postmaster has.
            let now = self.query_text("SELECT pg_conf_load_time()").await?;
            if now != before {
                return Ok(());
            }
            pause_until(deadline, || format!("server {} to reload", self.name)).await?;
        }
    }

    /// A connection of its own, past every proxy.
    pub async fn connect(&self, database: &str, login: &Login) -> Result<Client, ClusterError> {
        connect(self.port(), database, login)
            .await
            .map_err(|error| ClusterError::Query(self.name.clone(), error))
    }

    /// The superuser's connection to the database `postgres`.
    pub async fn admin(&self) -> Result<Client, ClusterError> {
        self.connect("postgres", &self.roles.superuser).await
    }

    /// Runs statements as the superuser in the database `app`, by a connection of their own.
    pub async fn execute(&self, sql: &str) -> Result<(), ClusterError> {
        let client = self.connect("app", &self.roles.superuser).await?;
        client.batch_execute(sql).await.map_err(|error| ClusterError::Query(self.name.clone(), error))
    }

    /// The first column of the first row that `sql` answers to the superuser in the database `app`,
    /// as text; empty when there is none.
    pub async fn query_text(&self, sql: &str) -> Result<String, ClusterError> {
        let client = self.connect("app", &self.roles.superuser).await?;
        let answer = client.simple_query(sql).await;
        let answer = answer.map_err(|error| ClusterError::Query(self.name.clone(), error))?;
        let first = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        Ok(first.unwrap_or_default().to_owned())
    }

    /// Waits until `sql` answers `expected`. An error ends the wait.
    pub async fn wait_for(&self, sql: &str, expected: &str) -> Result<(), ClusterError> {
        let deadline = Instant::now() + SERVER_DEADLINE;
        loop {
            let answer = self.query_text(sql).await?;
            if answer == expected {
                return Ok(());
            }
            let what = || format!("node {} still answers {answer:?} to {sql}", self.name);
            pause_until(deadline, what).await?;
        }
    }
}

impl Drop for PrivateNode {
    fn drop(&mut self) {
        if let Some(child) = lock(&self.process).as_mut() {
            // The janitor has ended it; where a task still holds this node, it has not been reaped.
            let _ = child.try_wait();
        }
    }
}

/// Connects to a server on 127.0.0.1 without TLS and drives the connection on the current runtime.
pub async fn connect(port: u16, database: &str, login: &Login) -> Result<Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).dbname(database).user(&login.user).password(&login.password);
    config.connect_timeout(Duration::from_secs(5));
    let (client, connection) = config.connect(NoTls).await?;
    // Its error is also the next statement's, which is where it is handled.
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

/// A short pause before the next look, or the end of patience.
async fn pause_until(deadline: Instant, what: impl FnOnce() -> String) -> Result<(), ClusterError> {
    if Instant::now() >= deadline {
        return Err(ClusterError::Deadline(what()));
    }
    tokio::time::sleep(POLL).await;
    Ok(())
}

/// A value between single quotes, in a configuration file or in SQL.
fn quoted(text: &str) -> String {
    text.replace('\'', "''")
}

/// A panic elsewhere does not make a child process any less ours to look after.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
