//! What somebody who runs the proxy sees and does.

use std::process::{Command, Stdio};

use crate::fixture::*;

#[tokio::test]
async fn metrics_say_what_ran_where() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    for _ in 0..10 {
        client.simple_query("INSERT INTO t VALUES (1)").await.unwrap();
    }
    cluster.wait_caught_up(0).await.unwrap();
    eventually("reads reach the replica", || async {
        client.simple_query("SELECT x FROM t").await.unwrap();
        proxy.metrics().await.sum("highwater_statements_total", &[("node", "b")]) >= 10.0
    })
    .await;
    let metrics = proxy.metrics().await;
    assert!(metrics.sum("highwater_statements_total", &[("node", "a")]) >= 10.0);
    assert_eq!(metrics.sum("highwater_clients", &[]), 1.0);
    let (_, text) = proxy.get("/metrics").await.unwrap();
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let name = sample.split(['{', ' ']).next().unwrap();
        let base =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(
            text.contains(&format!("# HELP {base} ")) || text.contains(&format!("# HELP {name} ")),
            "{name}"
        );
    }
}

/// `metric | type | labels` of every row of docs/METRICS.md.
fn described() -> Vec<(String, String, Vec<String>)> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/METRICS.md")).unwrap();
    let cells = |line: &str| line.split('|').map(|c| c.trim().replace('`', "")).collect::<Vec<_>>();
    page.lines()
        .filter(|line| line.starts_with("| `highwater_"))
        .map(cells)
        .map(|c| {
            let labels = c[3].split(", ").filter(|l| *l != "none").map(str::to_owned).collect();
            (c[1].clone(), c[2].clone(), labels)
        })
        .collect()
}

#[tokio::test]
async fn the_metrics_page_describes_every_metric_and_no_other() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    client.simple_query("SELECT 1").await.unwrap();
    // A replica's lag is there once it has been measured, a statement once it is counted.
    eventually("every metric has a sample", || async {
        let (_, text) = proxy.get("/metrics").await.unwrap();
        // A replica's pace is left out until it has had a backlog; several proxies' figures, where there is one (`several`
        // sees that they are there).
        let named = |name: &str| {
            name == "highwater_replica_replay_bytes_per_second"
                || name.starts_with("highwater_dcs_")
                || text.contains(&format!("# TYPE {name} "))
        };
        described().iter().all(|(name, ..)| named(name))
    })
    .await;
    let (_, text) = proxy.get("/metrics").await.unwrap();
    let described = described();
    for line in text.lines() {
        if let Some(typed) = line.strip_prefix("# TYPE ") {
            let (name, kind) = typed.split_once(' ').unwrap();
            let row = described.iter().find(|(n, ..)| n == name);
            assert_eq!(row.map(|(_, k, _)| k.as_str()), Some(kind), "{name} in docs/METRICS.md");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let row = described.iter().find(|(n, ..)| n == name || Some(n.as_str()) == family).unwrap();
            let inner = line.split_once('{').map_or("", |(_, rest)| rest.rsplit_once('}').unwrap().0);
            let labels = inner.split("\",").filter_map(|pair| pair.split_once('=')).map(|(l, _)| l);
            for label in labels.filter(|l| *l != "le") {
                assert!(row.2.iter().any(|l| l == label), "{name}: label {label} in docs/METRICS.md");
            }
        }
    }
}

#[tokio::test]
async fn what_happens_for_the_first_time_has_been_zero_before() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let (_, text) = proxy.get("/metrics").await.unwrap();
    for series in [
        "highwater_redone_total{reason=\"conflict\"} 0",
        "highwater_pins_total{reason=\"temporary_table\"} 0",
        "highwater_cancels_total{outcome=\"forwarded\"} 0",
        "highwater_client_refused_total{reason=\"too_many\"} 0",
        "highwater_login_failures_total{reason=\"password\"} 0",
        "highwater_backends_closed_total{node=\"b\",reason=\"broken\"} 0",
        "highwater_wait_seconds_count{for=\"mark\"} 0",
        "highwater_lost_write_total 0",
    ] {
        assert!(text.lines().any(|line| line == series), "{series} is missing in\n{text}");
    }
    assert!(proxy.metrics().await.sum("highwater_topology_changes_total", &[]) >= 1.0);
    eventually("samples are counted", || async {
        proxy.metrics().await.sum("highwater_samples_total", &[("node", "a")]) >= 1.0
    })
    .await;
}

#[tokio::test]
async fn the_age_of_the_primarys_position_grows_while_it_does_not_answer_and_is_small_again_after() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let age = || async { proxy.metrics().await.sum("highwater_primary_lsn_sample_age_seconds", &[]) };
    eventually("it is known", || async { age().await > 0.0 }).await;
    cluster.link(0).silence();
    eventually("it grows", || async { age().await > 2.0 }).await;
    cluster.link(0).heal();
    eventually("it is small again", || async { age().await < 1.0 }).await;
}

/// The first block of this language in a file of the project.
fn block_of(file: &str, language: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(path).unwrap();
    let from = text.split_once(&format!("```{language}\n")).unwrap().1;
    from.split_once("```").unwrap().0.to_owned()
}

#[tokio::test]
async fn the_grants_of_the_operations_page_are_enough_to_run_on() {
    let cluster = Cluster::start(1).await;
    // The cluster has a role of that name, with other rights.
    let sql = block_of("docs/OPERATIONS.md", "sql").replace("highwater", "watcher");
    let superuser = &cluster.roles().superuser;
    let operator = cluster.primary().connect("postgres", superuser).await.unwrap();
    operator.batch_execute(&sql).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let overrides = "control: { user: watcher, password: choose one }\n\
        auth: { query: 'SELECT * FROM watcher.verifier($1, $2)' }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let row = proxy.connect().await.query_one("SELECT current_user::text", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), "app");
    let refused = proxy.connect_as("app", superuser).await.unwrap_err();
    assert_eq!(refused.code().map(|code| code.code()), Some("28P01"));
    let config = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let (code, said) = with_config("check", &config);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("auth query works"), "{said}");
    // And each of them is needed.
    let revoke = "REVOKE EXECUTE ON FUNCTION pg_read_file(text, bigint, bigint, boolean) FROM watcher; \
        REVOKE pg_monitor FROM watcher; REVOKE USAGE ON SCHEMA watcher FROM watcher";
    operator.batch_execute(revoke).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let (code, said) = with_config("check", &config);
    assert_eq!(code, Some(1), "{said}");
    for what in ["lacks pg_monitor", "may not execute pg_read_file", "auth.query fails"] {
        assert!(said.contains(what), "{what}: {said}");
    }
}

#[tokio::test]
async fn the_grants_of_the_readme_are_enough_to_run_on() {
    let cluster = Cluster::start(1).await;
    let sql = block_of("README.md", "sql").replace("highwater", "reader").replace("'...'", "'choose one'");
    let superuser = &cluster.roles().superuser;
    let operator = cluster.primary().connect("postgres", superuser).await.unwrap();
    operator.batch_execute(&sql).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let overrides = "control: { user: reader, password: choose one }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let row = proxy.connect().await.query_one("SELECT current_user::text", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), "app");
    let config = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let (code, said) = with_config("check", &config);
    assert_eq!(code, Some(0), "{said}");
    // And the least of a configuration is one.
    let least = block_of("README.md", "yaml").replace("password_env: HIGHWATER_PASSWORD", "password: x");
    let (code, said) = with_config("check", &least);
    assert_eq!(code, Some(1), "its nodes are not there, and nothing else is wrong: {said}");
}

#[tokio::test]
async fn check_connects_with_the_tls_that_run_connects_with() {
    let (_cluster, proxy, _files) = super::login::with_tls("prefer", "verify-full").await;
    let config = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let (code, said) = with_config("check", &config);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("TLS 1.3"), "{said}");
    let (code, said) = with_config("check", &config.replace("verify-full", "disable"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("TLS offered, not used"), "{said}");
    let (code, said) = with_config("check", &config.replace("cert.pem", "nowhere.pem"));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("node_tls cannot be used") && said.contains("client_tls cannot be used"), "{said}");
}

#[tokio::test]
async fn sigterm_lets_a_transaction_finish_and_turns_new_clients_away() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut busy = proxy.raw_login().await;
    let mut idle = proxy.raw_login().await;
    busy.ask(&query("BEGIN; INSERT INTO t VALUES (1)")).await;
    idle.ask(&query("SELECT 1")).await;
    let (port, app) = (proxy.port(), cluster.roles().app.clone());
    let stopping = tokio::spawn(proxy.stop());
    let told = idle.read_to_end().await;
    assert_eq!(told[0].field(b'C').as_deref(), Some("57P01"));
    if let Ok(stream) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await {
        drop(stream);
        let refused = RawClient::connect(port).await.login("app", &app).await.unwrap_err();
        assert_eq!(refused.field(b'C').as_deref(), Some("57P03"));
    }
    assert_eq!(tags(&busy.ask(&query("COMMIT")).await), "CZ");
    busy.read_to_end().await;
    assert!(stopping.await.unwrap().success());
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "1");
}

#[tokio::test]
async fn a_log_line_is_plain_text_one_for_each_event_and_libraries_are_silent() {
    let cluster = Cluster::start(1).await;
    // The server then sends notices on each of the proxy's own connections, which its driver tells of.
    cluster.primary().execute("ALTER ROLE highwater SET client_min_messages = debug5").await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let proxy = Proxy::start(&cluster).await;
    proxy.connect().await.simple_query("DO $$ BEGIN RAISE NOTICE 'heard'; END $$").await.unwrap();
    let log = proxy.log();
    assert!(log.contains("primary found") && log.contains("replica in use"), "{log}");
    for line in log.lines() {
        assert!(line.contains(" highwater"), "not a line of ours: {line}");
        assert!(!line.contains('\u{1b}'), "{line}");
    }
}

/// The demo until it says `last`, then `signal`; all it has said, once it has ended well.
fn demo(arguments: &[&str], last: &str, signal: Option<nix::sys::signal::Signal>) -> String {
    demo_with(arguments, |line, _| signal.filter(|_| line.contains(last)))
}

/// The demo, with a look at each line as it comes and all lines before; what is answered is sent to it.
fn demo_with(
    arguments: &[&str],
    mut each: impl FnMut(&str, &str) -> Option<nix::sys::signal::Signal>,
) -> String {
    use std::io::BufRead as _;
    let mut child = Command::new(env!("CARGO_BIN_EXE_highwater"))
        .arg("demo")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    for line in std::io::BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(signal) = each(&line, &said) {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
            nix::sys::signal::kill(pid, signal).unwrap();
        }
        said += &line;
        said.push('\n');
    }
    assert!(child.wait().unwrap().success(), "{said}");
    assert!(said.ends_with("stopped; servers and files are gone\n"), "{said}");
    if let Some(directory) = said.lines().find_map(|line| line.strip_prefix("directory: ")) {
        assert!(!std::path::Path::new(directory).exists(), "{directory} is left");
    }
    said
}

#[test]
fn the_demo_shows_reads_on_replicas_writes_on_the_primary_and_nothing_stale() {
    let said = demo(&["--exit-after", "2500ms"], "", None);
    let sample = |sql: &str| {
        let line = said.lines().find(|line| line.contains(sql));
        line.unwrap_or_else(|| panic!("{sql}: {said}")).to_owned()
    };
    for sql in ["  SELECT balance FROM account WHERE id = 7  ", "  SELECT count(*) FROM account  "] {
        // On a machine that is busy the replicas may be behind for longer than is waited.
        let (line, behind) = (sample(sql), sample(sql).ends_with("read: behind"));
        assert!(line.contains(if behind { " a primary " } else { " replica " }), "{said}");
        assert!(behind || line.ends_with("read: read"), "{said}");
    }
    for sql in ["INSERT INTO account", "FOR UPDATE", "WITH m AS (DELETE", "SELECT 1; DELETE", "BEGIN; "] {
        assert!(sample(sql).contains(" a primary "), "{said}");
    }
    let traffic: Vec<&str> = said.lines().filter(|line| line.contains("own rows read back")).collect();
    assert!(!traffic.is_empty() && traffic.iter().all(|line| line.ends_with(", stale 0")), "{said}");
    assert!(traffic.iter().any(|line| line.contains(": read ")), "no replica has read: {said}");
}

#[test]
fn in_the_demo_the_primary_is_exchanged_on_the_console_and_the_old_one_comes_back() {
    let (mut exchanged, begun) = (false, std::time::Instant::now());
    let said = demo_with(&[], |line, before| {
        // Start, switchover, rejoin, and that it serves again, two waits each. It takes a few seconds; this is its end
        // when the old primary never comes back.
        assert!(begun.elapsed() < PATIENCE * 8, "{before}");
        if line.contains("own rows read back") && !exchanged {
            exchanged = true;
            let url = before.lines().find(|line| line.contains("/highwater'")).unwrap();
            let url = url.split('\'').nth(1).unwrap();
            let psql = highwater::demo::cluster::find_postgres().unwrap().join("psql");
            let mut command = Command::new(psql);
            command.args(["-X", "-d", url, "-c", "SWITCHOVER TO b", "-c", "SHOW HISTORY"]);
            let output = command.stdin(Stdio::null()).output().unwrap();
            let told = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success() && told.contains("(1 row)"), "{output:?}");
        }
        let back = before.contains("a is a replica of b") && line.contains("b primary");
        assert!(!line.contains("did not come back"), "{line}");
        (back && line.contains("a replica")).then_some(nix::sys::signal::Signal::SIGINT)
    });
    // No statement has failed, and nobody has read an old row of his own.
    let traffic = said.lines().filter(|line| line.contains("own rows read back"));
    assert!(traffic.clone().count() > 2 && traffic.clone().all(|line| line.ends_with(", stale 0")), "{said}");
}

#[test]
fn the_demo_leaves_nothing_behind_when_it_is_told_to_stop() {
    use nix::sys::signal::Signal::{SIGINT, SIGTERM};
    demo(&[], "live traffic", Some(SIGINT));
    demo(&[], "starting a on", Some(SIGTERM));
}

/// Runs the binary on a configuration: exit code and what it said.
pub(super) fn with_config(command: &str, text: &str) -> (Option<i32>, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.yaml");
    std::fs::write(&file, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_highwater"))
        .args([command, "-c"])
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout),
    )
}

#[test]
fn a_bad_configuration_is_named_by_line_and_key_and_starts_nothing() {
    let good = "listen: 127.0.0.1:1\nnodes:\n  - { name: a, host: 127.0.0.1, port: 1 }\ncontrol: { user: u, password: p, database: d }\n";
    for (bad, names) in [
        ("max_clents: 5\n", "max_clents"),
        ("max_clients: many\n", "max_clients"),
        ("max_clients: 0\n", "max_clients"),
        ("consistency: { level: sometimes }\n", "consistency.level"),
        ("drain_timeout: 5 parsecs\n", "drain_timeout"),
    ] {
        let (code, said) = with_config("run", &format!("{good}{bad}"));
        assert_eq!(code, Some(2), "{bad}: {said}");
        assert!(said.contains(names) && said.contains("config.yaml:5:"), "{bad}: {said}");
    }
    let twice = good.replace("control", "  - { name: a, host: 127.0.0.1, port: 2 }\ncontrol");
    assert_eq!(with_config("run", &twice).0, Some(2));
    let (code, said) = with_config("run", "");
    assert_eq!(code, Some(2), "{said}");
}

#[tokio::test]
async fn check_tries_the_nodes_and_prints_what_it_found() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let config = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let (code, said) = with_config("check", &config);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("primary") && said.contains("replica"), "{said}");
    // Debian's clusters each have a postgresql.conf of their own.
    for sql in [
        "ALTER SYSTEM SET timezone = 'Asia/Tokyo'",
        "ALTER SYSTEM SET bytea_output = 'escape'",
        "SELECT pg_reload_conf()",
    ] {
        cluster.node(1).execute(sql).await.unwrap();
    }
    cluster.node(1).wait_for("SHOW timezone", "Asia/Tokyo").await.unwrap();
    let (code, said) = with_config("check", &config);
    let home = cluster.node(0).query_text("SHOW timezone").await.unwrap();
    let other = format!(
        "node b: other defaults than the primary's: TimeZone Asia/Tokyo (a: {home}), bytea_output escape (a: hex): they"
    );
    assert!(code == Some(1) && said.contains(&other), "{said}");
}
