//! Where it is measured: a private cluster, the contenders over it, and pgbench.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use highwater::demo::cluster::{Login, PrivateCluster};
use highwater::demo::port::ReservedPort;

use crate::process;
use crate::report::quantile;
use crate::wire::Wire;

/// Seconds that pgbench may take beyond its time, for logging in and for a last statement.
const PATIENCE: u64 = 60;

/// Seconds that making its tables may take.
const FILLING: u64 = 300;

/// A statement that an idle client has run.
const ONE_ROW: &str = "SELECT abalance FROM pgbench_accounts WHERE aid = 1";

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A workload of pgbench's.
pub struct Workload {
    pub name: String,
    pub clients: u32,
    pub arguments: Vec<String>,
}

/// What stands between pgbench and the nodes.
pub struct Contender {
    pub name: &'static str,
    pub port: u16,
    /// `None`: direct, no process of its own.
    pub process: Option<Child>,
    /// Where to go for prepared statements, when it is another: PgBouncer's transaction mode has none
    /// before 1.21.
    prepared: Option<(u16, Child)>,
    _ports: Vec<ReservedPort>,
}

impl Contender {
    /// Port and process for a workload.
    pub fn for_workload(&self, workload: &str) -> (u16, Option<u32>) {
        match &self.prepared {
            Some((port, process)) if workload.contains("prepared") => (*port, Some(process.id())),
            _ => (self.port, self.process.as_ref().map(Child::id)),
        }
    }
}

impl Drop for Contender {
    /// It ends before its ports are given to others.
    fn drop(&mut self) {
        let prepared = self.prepared.as_mut().map(|(_, process)| process);
        for process in self.process.iter_mut().chain(prepared) {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// One run of pgbench.
pub struct Run {
    pub tps: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub proxy_us: Option<f64>,
    pub primary_us: f64,
}

/// What the measuring thread needs of the cluster: plain values, so that the cluster itself can be
/// dropped, and all be ended, while it measures.
pub struct Lab {
    pub directory: PathBuf,
    pgbench: PathBuf,
    pub app: Login,
    control: Login,
    pub primary_port: u16,
    primary_pid: u32,
    pub contenders: Vec<Contender>,
}

impl Lab {
    /// Of a cluster that runs.
    pub fn of(cluster: &PrivateCluster) -> Result<Lab, Failure> {
        Ok(Lab {
            directory: cluster.directory().to_owned(),
            pgbench: cluster.program("pgbench"),
            app: cluster.roles().app.clone(),
            control: cluster.roles().control.clone(),
            primary_port: cluster.primary().port(),
            primary_pid: cluster.primary().pid().ok_or("the primary has no process")?,
            contenders: Vec::new(),
        })
    }

    /// pgbench's tables, and one to copy into.
    pub fn fill(&self, scale: u32) -> Result<(), Failure> {
        let fill = ["-i", "-q", "-s", &scale.to_string()].map(str::to_owned);
        self.pgbench(self.primary_port, &fill, FILLING)?;
        self.sql(self.primary_port, "CREATE UNLOGGED TABLE sink (line text)")?;
        Ok(())
    }

    /// A command that works in the cluster's directory as its owner, so that the janitor ends it.
    fn command(&self, program: &Path) -> io::Result<Command> {
        let owner = fs::metadata(&self.directory)?;
        let mut command = Command::new(program);
        command.current_dir(&self.directory).stdin(Stdio::null()).process_group(0);
        if nix::unistd::Uid::effective().is_root() {
            command.uid(owner.uid()).gid(owner.gid());
        }
        Ok(command)
    }

    /// Gives a file to the servers' user.
    fn give(&self, path: &Path, mode: u32) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        let owner = fs::metadata(&self.directory)?;
        if nix::unistd::Uid::effective().is_root() {
            chown(path, Some(owner.uid()), Some(owner.gid()))?;
        }
        Ok(())
    }

    pub fn write(&self, name: &str, text: &str) -> io::Result<PathBuf> {
        let path = self.directory.join(name);
        fs::write(&path, text)?;
        self.give(&path, 0o600)?;
        Ok(path)
    }

    /// A copy of a program where the servers' user can run it, whatever the rights of target/ are.
    fn copy_program(&self, from: &Path, name: &str) -> io::Result<PathBuf> {
        let path = self.directory.join(name);
        fs::copy(from, &path)?;
        self.give(&path, 0o700)?;
        Ok(path)
    }

    fn start(&self, name: &str, command: &mut Command, port: u16) -> Result<Child, Failure> {
        let log = self.directory.join(format!("{name}.log"));
        let file = fs::File::create(&log)?;
        let mut child = command.stdout(file.try_clone()?).stderr(file).spawn()?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let tried = Wire::connect(port, &self.app).and_then(|mut wire| wire.query("SELECT 1"));
            match tried {
                Ok(_) => return Ok(child),
                Err(error) => {
                    if Instant::now() > deadline || child.try_wait()?.is_some() {
                        let log = fs::read_to_string(&log).unwrap_or_default();
                        return Err(format!("{name} does not serve: {error}\n{log}").into());
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    pub fn start_contenders(&mut self, nodes: &[u16]) -> Result<(), Failure> {
        let primary = self.primary_port;
        self.contenders.push(Contender {
            name: "direct",
            port: primary,
            process: None,
            prepared: None,
            _ports: Vec::new(),
        });

        let port = ReservedPort::claim()?;
        let program = self.copy_program(&std::env::current_exe()?, "relay")?;
        let mut command = self.command(&program)?;
        command.arg("--relay").arg(port.number().to_string()).arg(primary.to_string());
        let process = self.start("relay", &mut command, port.number())?;
        self.contenders.push(Contender {
            name: "relay",
            port: port.number(),
            process: Some(process),
            prepared: None,
            _ports: vec![port],
        });

        match find_program("pgbouncer") {
            None => eprintln!("PgBouncer is not installed (package pgbouncer): left out"),
            Some(program) => {
                let (port, session) = (ReservedPort::claim()?, ReservedPort::claim()?);
                let process = self.start_pgbouncer(&program, "transaction", port.number())?;
                let prepared = self.start_pgbouncer(&program, "session", session.number())?;
                self.contenders.push(Contender {
                    name: "pgbouncer",
                    port: port.number(),
                    process: Some(process),
                    prepared: Some((session.number(), prepared)),
                    _ports: vec![port, session],
                });
            }
        }

        for (name, split) in [("highwater", true), ("highwater-nosplit", false)] {
            let contender = self.highwater(name, name, nodes, split)?;
            self.contenders.push(contender);
        }
        Ok(())
    }

    /// A Highwater over these nodes, the primary first. `file`: what its files are called.
    pub fn highwater(
        &self,
        file: &str,
        name: &'static str,
        nodes: &[u16],
        split: bool,
    ) -> Result<Contender, Failure> {
        let program = self.directory.join("highwater");
        if !program.exists() {
            self.copy_program(Path::new(env!("CARGO_BIN_EXE_highwater")), "highwater")?;
        }
        let port = ReservedPort::claim()?;
        let text = highwater(port.number(), nodes, &self.control, split);
        let config = self.write(&format!("{file}.yaml"), &text)?;
        let mut command = self.command(&program)?;
        command.arg("run").arg("-c").arg(config);
        let process = self.start(file, &mut command, port.number())?;
        Ok(Contender {
            name,
            port: port.number(),
            process: Some(process),
            prepared: None,
            _ports: vec![port],
        })
    }

    /// Connects so many clients, each of which has run a statement or sent nothing.
    pub fn idle_clients(&self, port: u16, count: usize, worked: bool) -> io::Result<Vec<Wire>> {
        let connect = || -> io::Result<Wire> {
            let mut wire = Wire::connect(port, &self.app)?;
            if worked {
                wire.query(ONE_ROW)?;
            }
            Ok(wire)
        };
        (0..count).map(|_| connect()).collect()
    }

    fn start_pgbouncer(&self, program: &Path, mode: &str, port: u16) -> Result<Child, Failure> {
        let users = format!("\"{}\" \"{}\"\n", self.app.user, self.app.password);
        let users = self.write("pgbouncer.users", &users)?;
        // 10 000 idle clients in the memory test; in session mode each of 64 clients holds a backend.
        let text = format!(
            "[databases]\napp = host=127.0.0.1 port={} dbname=app\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
             pool_mode = {mode}\ndefault_pool_size = {}\nmax_client_conn = 12000\nlog_connections = 0\n\
             log_disconnections = 0\n",
            self.primary_port,
            users.display(),
            if mode == "session" { 80 } else { 20 },
        );
        let name = format!("pgbouncer-{mode}");
        let config = self.write(&format!("{name}.ini"), &text)?;
        self.start(&name, self.command(program)?.arg(config), port)
    }

    pub fn sql(&self, port: u16, sql: &str) -> io::Result<u64> {
        Wire::connect(port, &self.app)?.query(sql)
    }

    /// Runs pgbench to its end and returns what it printed. One that does not end in so many seconds is killed.
    pub fn pgbench(&self, port: u16, arguments: &[String], seconds: u64) -> Result<String, Failure> {
        let mut command = self.command(Path::new("timeout"))?;
        command.args(["--kill-after=5", &seconds.to_string()]).arg(&self.pgbench);
        command.env("PGPASSWORD", &self.app.password).env("PGSSLMODE", "disable");
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", &self.app.user]);
        let output = command.args(arguments).arg("app").output()?;
        let (said, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match output.status.code() {
            Some(0) => Ok(said.into_owned()),
            Some(124 | 137) => Err(format!("pgbench did not end in {seconds} s").into()),
            _ => Err(format!("pgbench: {}", errors.lines().next().unwrap_or("no word")).into()),
        }
    }

    pub fn run(&self, contender: &Contender, workload: &Workload, seconds: u32) -> Result<Run, Failure> {
        let (port, pid) = contender.for_workload(&workload.name);
        let mut arguments = workload.arguments.clone();
        arguments.extend(
            ["-n", "-T", &seconds.to_string(), "-c", &workload.clients.to_string()].map(str::to_owned),
        );
        // A tenth of the latencies is plenty, and pgbench's own work stays small.
        arguments.extend(["-l", "--log-prefix=latency", "--sampling-rate=0.1"].map(str::to_owned));
        let spent = |pid: Option<u32>| pid.map(process::cpu_us).transpose();
        let (before, primary_before) = (spent(pid)?, process::server_cpu_us(self.primary_pid)?);
        let said = self.pgbench(port, &arguments, u64::from(seconds) + PATIENCE)?;
        let (after, primary_after) = (spent(pid)?, process::server_cpu_us(self.primary_pid)?);
        let done = number_after(&said, "actually processed: ").ok_or("no count in pgbench's report")?;
        if done < 1.0 {
            // Its time runs while it logs in.
            return Err(format!("pgbench ran no transaction in {seconds} s: the machine is too busy").into());
        }
        let mut latencies = self.take_latencies()?;
        latencies.sort_by(f64::total_cmp);
        Ok(Run {
            tps: number_after(&said, "tps = ").ok_or("no tps in pgbench's report")?,
            p50_us: quantile(&latencies, 0.5),
            p99_us: quantile(&latencies, 0.99),
            proxy_us: after.zip(before).map(|(after, before)| (after - before) / done),
            primary_us: (primary_after - primary_before) / done,
        })
    }

    /// Reads and removes pgbench's logs: the third field of a line is a latency.
    fn take_latencies(&self) -> io::Result<Vec<f64>> {
        let mut latencies = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("latency.") {
                let text = fs::read_to_string(entry.path())?;
                let third = |line: &str| line.split(' ').nth(2)?.parse::<f64>().ok();
                latencies.extend(text.lines().filter_map(third));
                fs::remove_file(entry.path())?;
            }
        }
        Ok(latencies)
    }
}

/// Highwater's configuration: the defaults but for the room for 10 000 idle clients.
fn highwater(port: u16, nodes: &[u16], control: &Login, split: bool) -> String {
    let mut text = format!("listen: 127.0.0.1:{port}\nhttp: null\nmax_clients: 12000\nnodes:\n");
    for (nth, port) in nodes.iter().enumerate() {
        let _ = writeln!(text, "  - {{ name: node{nth}, host: 127.0.0.1, port: {port} }}");
    }
    let _ = write!(
        text,
        "control:\n  user: {}\n  password: \"{}\"\n  database: postgres\nnode_tls:\n  mode: disable\n\
         routing:\n  split: {split}\nlog:\n  level: warn\n",
        control.user, control.password,
    );
    text
}

pub fn find_program(name: &str) -> Option<PathBuf> {
    // Not every user's PATH has sbin, where Debian puts PgBouncer.
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/usr/local/sbin"]);
    places.map(|place| Path::new(place).join(name)).find(|program| program.is_file())
}

fn number_after(text: &str, mark: &str) -> Option<f64> {
    let (_, rest) = text.split_once(mark)?;
    rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
}
