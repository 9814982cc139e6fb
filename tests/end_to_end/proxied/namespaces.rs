//! Primary, replicas and proxy on machines of their own, as far as the network goes: a namespace each, joined by a
//! bridge, where iptables drops packets. Nothing is refused or closed then; it is silent. (The fixture's links do the same
//! to one TCP connection at a time.) It takes root and the programs `ip`, `iptables` and `setpriv`; elsewhere the test
//! says why it is skipped.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use highwater::demo::cluster::{ClusterOptions, Login};

use super::failover::TABLE;
use crate::fixture::*;

const NODES: [&str; 3] = ["a", "b", "c"];
const PROXY: &str = "p";
/// The one that joins them.
const SWITCH: &str = "s";
const PORT: u16 = 6432;

fn address(host: &str) -> String {
    let last = NODES.iter().position(|name| *name == host).map_or(9, |index| index + 1);
    format!("10.77.0.{last}")
}

fn run_command(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim_end())),
    }
}

fn ip(arguments: &str) -> Result<String, String> {
    run_command(Command::new("ip").args(arguments.split(' ')))
}

/// The namespaces. They go with it, and with all that runs in them, also when the test process is killed.
struct Net {
    prefix: String,
    janitor: Child,
}

impl Net {
    /// Why it cannot be had, if so.
    fn make() -> Result<Net, String> {
        let prefix = format!("hw{:08x}", rand::random::<u32>());
        for program in ["iptables --version", "setpriv --version"] {
            let mut words = program.split(' ');
            run_command(Command::new(words.next().unwrap()).args(words))?;
        }
        // It ends when we do: its input is closed then.
        let janitor = Command::new("/bin/sh")
            .args([
                "-c",
                "trap '' INT TERM HUP; read -r _; for n in s a b c p; do \
                          for pid in $(ip netns pids \"$1-$n\" 2>/dev/null); do kill -KILL $pid; done; \
                          ip netns del \"$1-$n\"; done 2>/dev/null",
                "janitor",
                &prefix,
            ])
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let net = Net { prefix, janitor };
        ip(&format!("netns add {}", net.of(SWITCH)))?;
        let switch = net.of(SWITCH);
        ip(&format!("-n {switch} link add bridge type bridge"))?;
        ip(&format!("-n {switch} link set bridge up"))?;
        for host in NODES.into_iter().chain([PROXY]) {
            let its = net.of(host);
            ip(&format!("netns add {its}"))?;
            ip(&format!("link add to-{host} netns {switch} type veth peer name eth0 netns {its}"))?;
            ip(&format!("-n {switch} link set to-{host} master bridge up"))?;
            ip(&format!("-n {its} addr add {}/24 dev eth0", address(host)))?;
            ip(&format!("-n {its} link set eth0 up"))?;
            ip(&format!("-n {its} link set lo up"))?;
            run_command(net.within(host, "iptables").args(["-w", "-L", "-n"]))?;
        }
        Ok(net)
    }

    fn of(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// A program on that host.
    fn within(&self, host: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.of(host), program]);
        command
    }

    /// Drops all that passes between a host and others, both ways.
    fn cut(&self, host: &str, others: &[&str]) {
        for other in others {
            for (chain, side) in [("INPUT", "-s"), ("OUTPUT", "-d")] {
                let rule = ["-w", "-A", chain, side, &address(other), "-j", "DROP"];
                run_command(self.within(host, "iptables").args(rule)).unwrap();
            }
        }
    }

    fn heal(&self, host: &str) {
        run_command(self.within(host, "iptables").args(["-w", "-F"])).unwrap();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}

/// Servers and the proxy, each on its host.
struct Site {
    // Its processes end with it, before the directories that they use.
    net: Net,
    cluster: Cluster,
    children: Vec<Child>,
    directory: tempfile::TempDir,
    psql: PathBuf,
    /// The last one that was tried, and those that were acknowledged.
    rows: std::sync::Mutex<(i64, Vec<i64>)>,
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- the proxy's log:\n{}", self.log());
        }
        for child in &mut self.children {
            // They end by this or by the janitor; a zombie is nobody's use.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Site {
    async fn make(net: Net) -> Site {
        let hba = "local all all scram-sha-256\nhost all all 0.0.0.0/0 scram-sha-256\n\
                   host replication all 0.0.0.0/0 scram-sha-256\n";
        let options = ClusterOptions {
            replicas: 2,
            settings: vec![("listen_addresses".to_owned(), "'*'".to_owned())],
            files: vec![("pg_hba.conf".to_owned(), hba.to_owned())],
            ..ClusterOptions::default()
        };
        let cluster = Cluster::start_with(options).await;
        cluster.set_up(TABLE).await;
        let replicator = &cluster.roles().replicator;
        for (index, name) in NODES.iter().enumerate() {
            let upstream = format!(
                "host={} port={} user={} password={} application_name={name} connect_timeout=2",
                address("a"),
                cluster.node(0).port(),
                replicator.user,
                replicator.password
            );
            if index > 0 {
                cluster.node(index).set("primary_conninfo", &upstream).await.unwrap();
            }
        }
        for node in [2, 1, 0] {
            cluster.node(node).stop_fast().await.unwrap();
        }
        let (directory, psql) = (tempfile::tempdir().unwrap(), cluster.program("psql"));
        let mut site =
            Site { net, cluster, children: Vec::new(), directory, psql, rows: std::sync::Mutex::default() };
        for (index, name) in NODES.iter().enumerate() {
            site.start_node(index, name);
        }
        let superuser = site.cluster.roles().superuser.clone();
        let streaming = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        eventually("the replicas stream", || async {
            site.ask(PROXY, "a", &superuser, streaming).ok().as_deref() == Some("2")
        })
        .await;
        site.start_proxy();
        site
    }

    fn start_node(&mut self, index: usize, host: &str) {
        let data = self.cluster.node(index).data().to_owned();
        let owner = std::fs::metadata(&data).unwrap();
        let (uid, gid) = (owner.uid().to_string(), owner.gid().to_string());
        let log = std::fs::File::options().append(true).open(data.with_extension("log")).unwrap();
        let mut command = self.net.within(host, "setpriv");
        command.args(["--reuid", &uid, "--regid", &gid, "--clear-groups", "--"]);
        // From there on it is known by its directory.
        command.arg(self.cluster.program("postgres")).arg("-D").arg(&data).current_dir(&data);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.children.push(command.spawn().unwrap());
    }

    fn start_proxy(&mut self) {
        let nodes: Vec<String> = NODES
            .iter()
            .enumerate()
            .map(|(index, name)| {
                format!(
                    "{{ name: {name}, host: {}, port: {} }}",
                    address(name),
                    self.cluster.node(index).port()
                )
            })
            .collect();
        let overrides = format!(
            "nodes: [ {} ]\n\
             failover: {{ mode: auto, durability: quorum, state_dir: '{}', sync: {{ manage: true }}, startup_grace: 1s, \
             sever_timeout: 20s, check_interval: 200ms, check_timeout: 600ms, kick_timeout: 1s, pause_timeout: 3s }}",
            nodes.join(", "),
            self.directory.path().join("state").display()
        );
        let options = ProxyOptions { overrides: &overrides, ..ProxyOptions::default() };
        let config = self.directory.path().join("config.yaml");
        std::fs::write(&config, config_text(&self.cluster, PORT, PORT + 1, &options)).unwrap();
        let log = std::fs::File::create(self.directory.path().join("log")).unwrap();
        let program = std::env::var("HIGHWATER_BINARY");
        let mut command =
            self.net.within(PROXY, program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_highwater")));
        command.args(["run", "-c"]).arg(config);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.children.push(command.spawn().unwrap());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// What psql, run on host `from`, is answered by `to`: a node, or the proxy.
    fn ask(&self, from: &str, to: &str, login: &Login, sql: &str) -> Result<String, String> {
        let (host, port, database) = match NODES.iter().position(|name| *name == to) {
            Some(index) => (address(to), self.cluster.node(index).port(), "app"),
            None if to == "console" => ("127.0.0.1".to_owned(), PORT, "highwater"),
            None => ("127.0.0.1".to_owned(), PORT, "app"),
        };
        // Whatever is silent is given up.
        let mut command = self.net.within(from, "timeout");
        let settings =
            format!("host={host} port={port} dbname={database} user={} connect_timeout=3", login.user);
        command.args(["-s", "KILL", "10"]).arg(&self.psql).args([&settings, "-XAtqc", sql]);
        command.env("PGPASSWORD", &login.password).env("PGSSLMODE", "disable");
        run_command(&mut command)
    }

    /// Writes the next row through the proxy, and keeps what was acknowledged.
    fn write(&self) -> Result<(), String> {
        let mut rows = self.rows.lock().unwrap();
        rows.0 += 1;
        let row = rows.0;
        self.ask(PROXY, PROXY, &self.cluster.roles().app, &format!("INSERT INTO t VALUES ({row})"))?;
        rows.1.push(row);
        Ok(())
    }

    /// An item of SHOW FAILOVER.
    fn item(&self, item: &str) -> String {
        let control = &self.cluster.roles().control;
        let shown = self.ask(PROXY, "console", control, "SHOW FAILOVER").unwrap_or_default();
        shown
            .lines()
            .filter_map(|line| line.split_once('|'))
            .find(|(its, _)| *its == item)
            .map_or_else(String::new, |(_, value)| value.to_owned())
    }

    fn of_node(&self, node: &str, sql: &str) -> Result<String, String> {
        self.ask(node, node, &self.cluster.roles().superuser, sql)
    }

    async fn says(&self, what: &str, before: usize) {
        eventually(what, || async { self.log().matches(what).count() > before }).await;
    }

    async fn is_well(&self) {
        eventually("all is well, and writes are covered", || async {
            self.item("state") == "healthy" && self.item("writes_covered") == "yes"
        })
        .await;
    }

    /// Nobody has been promoted.
    fn all_as_before(&self) {
        for standby in ["b", "c"] {
            assert_eq!(self.of_node(standby, "SELECT pg_is_in_recovery()").unwrap(), "t", "{standby}");
        }
        assert_eq!(self.item("epoch"), "1");
        assert_eq!(self.item("primary"), "a");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn packets_that_are_dropped_replace_a_primary_only_if_nobody_reaches_it_and_it_acknowledges_nothing_more()
 {
    let net = match Net::make() {
        Ok(net) => net,
        Err(why) => return println!("skipped: no network namespaces with iptables here: {why}"),
    };
    let site = Site::make(net).await;
    site.is_well().await;
    let names = "SHOW synchronous_standby_names";
    eventually("either standby may confirm", || async {
        site.of_node("a", names).is_ok_and(|names| names == "ANY 1 (\"b\", \"c\")")
    })
    .await;
    site.write().unwrap();

    // Only the proxy does not reach the primary: its standbys do.
    let told = "standbys stream from it: no failover";
    let before = site.log().matches(told).count();
    site.net.cut(PROXY, &["a"]);
    site.says(told, before).await;
    assert!(site.write().is_err());
    site.all_as_before();
    site.net.heal(PROXY);
    site.is_well().await;
    eventually("it is written to again", || async { site.write().is_ok() }).await;

    // The proxy reaches nobody.
    let told = "neither the primary nor a standby that knows of it can be reached";
    let before = site.log().matches(told).count();
    site.net.cut(PROXY, &NODES);
    site.says(told, before).await;
    assert!(site.write().is_err());
    site.net.heal(PROXY);
    site.is_well().await;
    site.all_as_before();
    site.write().unwrap();

    // Nobody reaches the primary, but a client on its own host.
    let cut = Instant::now();
    site.net.cut("a", &["b", "c", PROXY]);
    let (stop, late) = (AtomicBool::new(false), std::sync::Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let app = &site.cluster.roles().app;
            for row in -1000.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                // A wait that is ended is a success with a warning, which is not one.
                let insert = format!("SET client_min_messages = warning; INSERT INTO t VALUES ({row})");
                let mut command = site.net.within("a", "timeout");
                let settings = format!(
                    "host={} port={} dbname=app user={} connect_timeout=3",
                    address("a"),
                    site.cluster.node(0).port(),
                    app.user
                );
                command.args(["-s", "KILL", "10"]).arg(&site.psql).args([&settings, "-XAtqc", &insert]);
                command.env("PGPASSWORD", &app.password).env("PGSSLMODE", "disable").stdin(Stdio::null());
                let Output { status, stderr, .. } = command.output().unwrap();
                if status.success() && stderr.is_empty() {
                    late.lock().unwrap().push(row);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let stopped = StopAtEnd(&stop);
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                eventually("another one takes over", || async {
                    site.write().is_ok() && ["b", "c"].contains(&site.item("primary").as_str())
                })
                .await;
                println!("first write {:?} after the cut", cut.elapsed());
                site.net.heal("a");
                eventually("the old one is fenced", || async {
                    site.of_node("a", "SHOW default_transaction_read_only").is_ok_and(|on| on == "on")
                        && site.item("quarantined").starts_with("a (old_primary")
                })
                .await;
                // Still after that.
                for _ in 0..5 {
                    site.write().unwrap();
                }
            });
        });
        drop(stopped);
    });
    assert_eq!(*late.lock().unwrap(), Vec::<i64>::new(), "the old primary has acknowledged these");
    let new = site.item("primary");
    let other = if new == "b" { "c" } else { "b" };
    let rows = site.of_node(&new, "SELECT string_agg(x::text, ' ' ORDER BY x) FROM t").unwrap();
    let rows: Vec<i64> = rows.split(' ').map(|row| row.parse().unwrap()).collect();
    for row in &site.rows.lock().unwrap().1 {
        assert!(rows.contains(row), "{row} was acknowledged and is not on {new}: {rows:?}");
    }
    assert_eq!(site.of_node(&new, "SELECT pg_is_in_recovery()").unwrap(), "f");
    assert_eq!(site.of_node(other, "SELECT pg_is_in_recovery()").unwrap(), "t");
    assert_eq!(site.item("epoch"), "2");
}

/// Also when the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
